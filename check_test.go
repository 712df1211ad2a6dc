package main

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// check runs -check for the cluster's first node and returns what it says: its facts, the warnings, and the
// line of the error. Nothing may be made or changed.
func (c *cluster) check() (code int, facts, warnings []string, stderr string) {
	c.tb.Helper()
	before := tree(c.tb, c.dir)
	code, stdout, stderr := runNode(c.tb.(*testing.T), c.tb.TempDir(), append([]string{"-check"}, c.nodes[0].args...)...)
	if diff := cmp.Diff(before, tree(c.tb, c.dir)); diff != "" {
		c.tb.Errorf("-check changed files (-before +after):\n%s", diff)
	}
	for line := range strings.Lines(stdout) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "level=") {
			warnings = append(warnings, line)
		} else {
			facts = append(facts, line)
		}
	}
	for _, secret := range []string{adminKey, readerKey, clusterSecret} {
		if strings.Contains(stdout+stderr, secret) {
			c.tb.Errorf("-check shows %q", secret)
		}
	}
	return code, facts, warnings, stderr
}

// tree is what is below a directory, with mode, size and time; of directories no time.
func tree(tb testing.TB, dir string) map[string]string {
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err == nil && d.IsDir() {
			found[path] = fi.Mode().String()
		} else if err == nil {
			found[path] = fmt.Sprint(fi.Mode(), fi.Size(), fi.ModTime().UnixNano())
		}
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return found
}

// TestCheck: -check says what a start would do, in each state of a node, touches nothing and ends as the
// start would.
func TestCheck(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	n := c.nodes[0]
	want := []string{
		"program: confman " + version(),
		"file: " + c.config,
		"node: node1",
		"listens: api " + n.api,
		"listens: raft " + n.raft,
		"data: " + n.data + ", to be made",
		"member: node1 " + n.url + ", raft " + n.raft,
		"quorum: 1 of 1",
		"transport: plaintext",
		`key: "Operators", admin, actor "ops@test", namespaces: all`,
		`key: "Service", reader, actor "svc@test", namespaces: all`,
	}
	expect := func(status int, warned string) {
		t.Helper()
		code, facts, warnings, stderr := c.check()
		if diff := cmp.Diff(want, facts); diff != "" || code != status {
			t.Errorf("exit status %d, want %d; %s(-want +got):\n%s", code, status, stderr, diff)
		}
		if got := strings.Join(warnings, "\n"); !strings.Contains(got, warned) || (got == "") != (warned == "") {
			t.Errorf("it warns %q, want %q", got, warned)
		}
		if status == 0 && stderr != "" {
			t.Errorf("standard error: %s", stderr)
		} else if status != 0 {
			wantOneLine(t, stderr, "confman: ")
		}
	}
	// put makes the fact that begins with what was into these.
	put := func(was string, now ...string) {
		t.Helper()
		i := slices.IndexFunc(want, func(s string) bool { return strings.HasPrefix(s, was) })
		if i < 0 {
			t.Fatalf("no fact begins with %q", was)
		}
		want = slices.Replace(want, i, i+1, now...)
	}
	expect(0, "")

	c.start()
	put("listens: api", "listens: api "+n.api+", in use")
	put("listens: raft", "listens: raft "+n.raft+", in use")
	put("data:", fmt.Sprintf("data: %s, in use by process %d", n.data, n.cmd.Process.Pid))
	expect(0, "")
	n.stop()
	put("listens: api", "listens: api "+n.api)
	put("listens: raft", "listens: raft "+n.raft)
	put("data:", "data: "+n.data+", of an earlier start", "state: kept after a clean stop")
	expect(0, "")
	c.start()
	n.kill()
	put("state:", "state: kept after a killed process")
	expect(0, "")
	writeFile(t, filepath.Join(n.data, "state.mark"), []byte("boot another\n"))
	put("state:", "state: "+stateUnclean)
	expect(0, "")

	c.configure(with("Cluster", "MaxStaleness", 700), with("Cluster", "Listen", "0.0.0.0"), with("Cluster", "Secret", clusterSecret),
		addKey("sha256:"+strings.Repeat("ab", 32), "old", "reader", "Namespaces", []string{"a", "b*"}, "NotAfter", "2020-01-01T00:00:00Z"))
	put("listens: api", strings.Replace("listens: api "+n.api, "127.0.0.1", "0.0.0.0", 1))
	put("listens: raft", strings.Replace("listens: raft "+n.raft, "127.0.0.1", "0.0.0.0", 1))
	put("transport:", "transport: tls, secrets: 1")
	want = append(want, `key: "old", reader, actor "old", namespaces: a b*, expired 2020-01-01T00:00:00Z`, "setting: Cluster.MaxStaleness 700, default 5000")
	expect(0, "the API is served as plain text")
	c.configure(with("Cluster", "Listen", "127.0.0.1"))
	put("listens: api", "listens: api "+n.api)
	put("listens: raft", "listens: raft "+n.raft)

	if err := os.Chmod(c.config, 0o644); err != nil {
		t.Fatal(err)
	}
	expect(0, `members="Cluster.Secret Auth.ApiKeys[0].Key Auth.ApiKeys[1].Key" do="chmod o-rwx `+c.config)
	if err := os.Chmod(c.config, 0o600); err != nil {
		t.Fatal(err)
	}

	certFile, keyFile := writeCertificate(t, c.dir, 1)
	c.configure(withTLS(certFile, keyFile))
	if err := os.Chmod(keyFile, 0o604); err != nil {
		t.Fatal(err)
	}
	code, facts, warnings, stderr := c.check()
	names(t, strings.Join(append(facts, warnings...), "\n"), "certificate: "+certFile+", CN=confman, until 20", "member: node1 https://", "everyone can read the key")
	if code != 0 {
		t.Errorf("with a certificate: exit status %d, %s", code, stderr)
	}
	writeFile(t, certFile, nil)
	code, _, _, stderr = c.check()
	if code != 2 {
		t.Errorf("without a certificate: exit status %d", code)
	}
	wantOneLine(t, stderr, "Tls.Cert")
	writeCertificate(t, c.dir, 1)
	ln, err := net.Listen("tcp", n.raft)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if code, _, _, stderr = c.check(); code != 1 {
		t.Errorf("with a port in use: exit status %d", code)
	}
	wantOneLine(t, stderr, n.raft, "address already in use")
	if started, _, said := runNode(t, t.TempDir(), n.args...); started != code || !strings.HasSuffix(said, stderr) {
		t.Errorf("-check ends with %d, %q; a start with %d, %q", code, stderr, started, said)
	}

	// A name that no resolver takes: whether a network is there does not matter.
	long := strings.Repeat("a", 64) + ".example"
	c.configure(func(doc map[string]any) {
		nodes := doc["Cluster"].(map[string]any)
		nodes["Nodes"] = append(nodes["Nodes"].([]any), map[string]any{"Id": "node2", "Address": long, "ApiPort": 1, "RaftPort": 2})
	})
	_, facts, warnings, _ = c.check()
	names(t, strings.Join(append(facts, warnings...), "\n"), "quorum: 2 of 2", "name does not resolve", long)
	c.configure(with("Cluster", "MaxStaleness", 1))
	code, facts, _, stderr = c.check()
	if code != 2 || facts != nil {
		t.Errorf("with a mistake: exit status %d, %q", code, facts)
	}
	wantOneLine(t, stderr, "Cluster.MaxStaleness")
}
