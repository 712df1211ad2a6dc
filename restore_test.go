package main

// Backups are taken of real clusters and restored into them and into new ones.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

// backup fetches a backup from a node.
func (n *node) backup(tb testing.TB) *answer {
	tb.Helper()
	a := n.ask(tb, "GET", "/api/v1/backup?consistent", "")
	if a.status != http.StatusOK {
		tb.Fatalf("backup of %s: %v", n.id, a)
	}
	return a
}

// restore restores a backup through a node.
func (n *node) restore(tb testing.TB, backup []byte) (revision, changed uint64) {
	tb.Helper()
	a := n.ask(tb, "PUT", "/api/v1/backup", string(backup))
	var doc struct{ Revision, Changed uint64 }
	if err := json.Unmarshal(a.body, &doc); err != nil || a.status != http.StatusOK {
		tb.Fatalf("restore at %s: %v", n.id, a)
	}
	return doc.Revision, doc.Changed
}

// verified asks a node to compute its trail's hashes anew.
func (n *node) verified(tb testing.TB) {
	tb.Helper()
	if a := n.ask(tb, "GET", "/api/v1/verify?consistent", ""); a.status != http.StatusOK || !bytes.Contains(a.body, []byte(`"ok":true`)) {
		tb.Errorf("verify at %s: %v", n.id, a)
	}
}

// TestRestore takes a backup of a cluster, restores it there while clients stream and wait, and then makes
// a new cluster of it.
func TestRestore(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, calm)
	leader, follower := c.leader(), c.followers()[0]
	first := leader.put(t, "app", "k", "one")
	leader.put(t, "app", "same", "s")
	leader.put(t, "gone", "k", "back")
	leader.write(t, "PUT", "/api/v1/namespaces/app", `{"description":"d","owner":"o"}`)
	taken := follower.backup(t)
	b := taken.body
	line, pages, _ := bytes.Cut(b, []byte("\n"))
	var version, rev, size int
	var hash, sum string
	if _, err := fmt.Sscanf(string(line), "confman-backup %d revision=%d hash=%s size=%d sha256=%s", &version, &rev, &hash, &size, &sum); err != nil ||
		version != 1 || rev != 4 || size != len(pages) || len(hash) != 64 || len(sum) != 64 {
		t.Errorf("the first line is %q (%v), for %d bytes", line, err, len(pages))
	}
	for name, want := range map[string]string{"Content-Type": "application/octet-stream", "Content-Disposition": `attachment; filename="confman-4.backup"`,
		"Content-Length": fmt.Sprint(len(b)), "Confman-Revision": "4", "Confman-Staleness-Ms": "0", "Etag": ""} {
		if got := taken.header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if a := follower.ask(t, "HEAD", "/api/v1/backup", ""); a.status != http.StatusOK || a.header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("HEAD: %v", a)
	}

	later := leader.put(t, "app", "k", "two")
	leader.put(t, "app", "new", "n")
	leader.put(t, "else", "k", "v")
	leader.delete(t, "gone", "k")
	leader.write(t, "DELETE", "/api/v1/namespaces/gone", "")
	was := c.converge().Revision
	for what, m := range map[string]struct {
		body    string
		headers []string
		status  int
	}{
		"nothing":         {"", nil, 422},
		"half a backup":   {string(b[:len(b)/2]), nil, 422},
		"a backup more":   {string(b) + string(b), nil, 422},
		"another byte":    {string(b[:len(b)-100]) + "x" + string(b[len(b)-99:]), nil, 422},
		"a coded body":    {string(b), []string{"Content-Encoding", "gzip"}, 415},
		"with conditions": {string(b), []string{"If-Match", "*"}, 400},
		"too large":       {"confman-backup 1 revision=4 hash=" + hash + " size=1125899906842624 sha256=" + sum + "\n", nil, 507},
	} {
		if a := leader.ask(t, "PUT", "/api/v1/backup", m.body, m.headers...); a.status != m.status || !bytes.Contains(a.body, []byte(`"outcome":"not-applied"`)) {
			t.Errorf("%s: %v", what, a)
		}
	}
	if now := c.converge().Revision; now != was {
		t.Errorf("what is refused moves the revision from %d to %d", was, now)
	}

	// One that is on its way keeps others out until its client is gone.
	var slow *pending
	until(t, 10*time.Second, func() error {
		if slow == nil {
			slow = newPending(t, leader)
			if _, err := fmt.Fprintf(slow.conn, "PUT /api/v1/backup HTTP/1.1\r\nHost: test\r\nX-API-Key: %s\r\nContent-Length: %d\r\n\r\n%s", adminKey, len(b), b[:len(b)-1]); err != nil {
				t.Fatal(err)
			}
		}
		a := leader.ask(t, "PUT", "/api/v1/backup", "")
		if a.status == http.StatusConflict {
			return nil
		}
		// The question came first, and where it was there still when the slow one came, that one has its
		// answer: it is sent again.
		slow.conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if n, _ := slow.conn.Read(make([]byte, 1)); n > 0 {
			slow.conn.Close()
			slow = nil
		}
		return fmt.Errorf("a second restore is answered %v", a)
	})
	slow.conn.Close()
	until(t, 10*time.Second, func() error {
		if a := leader.ask(t, "PUT", "/api/v1/backup", ""); a.status != http.StatusUnprocessableEntity {
			return fmt.Errorf("when the first has gone away: %v", a)
		}
		return nil
	})

	var streams []*stream
	for _, ns := range []string{"app", "else", ""} {
		s, a, err := openStream(follower, ns, "")
		if s == nil {
			t.Fatal(a, err)
		}
		defer s.close()
		streams = append(streams, s)
	}
	wait := newPending(t, c.followers()[1])
	if err := wait.send("GET", keyPath("app", "k")+"?wait=1m", "", "If-None-Match", fmt.Sprintf(`"%d"`, later.Revision)); err != nil {
		t.Fatal(err)
	}
	held(t, wait, 100*time.Millisecond)
	// Through a follower, which sends the client on.
	if rev, changed := follower.restore(t, b); rev != was+1 || changed != 4 {
		t.Errorf("revision %d and %d changes, want %d and 4", rev, changed, was+1)
	}
	for _, s := range streams {
		f, err := s.next()
		if err != nil || f.event != "store.restore" || f.id != fmt.Sprint(was+1, "-0") || !strings.Contains(f.data, sum) {
			t.Errorf("a stream says %+v (%v)", f, err)
		}
	}
	if a, err := wait.answer(); err != nil || a.status != http.StatusOK || !bytes.Contains(a.body, []byte(`"value":"one"`)) {
		t.Errorf("who waited is answered %v (%v)", a, err)
	}
	c.converge()
	if e := follower.get(t, "app", "k"); e.Value != "one" || e.Version != 3 || e.Revision != was+1 || e.UpdatedBy != "ops@test" {
		t.Errorf("app/k is %+v", e)
	}
	if e := follower.get(t, "app", "same"); e.Revision != first.Revision+1 {
		t.Errorf("app/same is %+v", e)
	}
	for path, status := range map[string]int{keyPath("gone", "k"): 200, keyPath("app", "new"): 404, "/api/v1/namespaces/else": 404, keyPath("app", "k") + "?version=2": 410} {
		if a := leader.ask(t, "GET", path, ""); a.status != status {
			t.Errorf("%s: %v, want %d", path, a, status)
		}
	}
	if a := leader.ask(t, "PUT", keyPath("app", "k"), `{"value":"x"}`, "If-Match", fmt.Sprintf(`"%d"`, first.Revision)); a.status != http.StatusPreconditionFailed {
		t.Errorf("with the tag that it had: %v", a)
	}
	if rev, changed := leader.restore(t, b); rev != was+1 || changed != 0 {
		t.Errorf("once more: revision %d, %d changes", rev, changed)
	}
	leader.verified(t)
	file := filepath.Join(t.TempDir(), "backup")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("curl"); err == nil {
		out, err := exec.Command("curl", "-sSL", "-T", file, "-H", "X-API-Key: "+adminKey, follower.url+"/api/v1/backup").CombinedOutput()
		if want := fmt.Sprintf(`{"revision":%d,"changed":0}`+"\n", was+1); err != nil || string(out) != want {
			t.Errorf("curl -L -T: %s (%v)", out, err)
		}
	}
	restoreNewCluster(t, file, b)
}

// restoreNewCluster is the second half of TestRestore: a new cluster is made of a backup of revision 4.
func restoreNewCluster(t *testing.T, file string, b []byte) {
	t.Helper()
	c := newCluster(t, 3, calm)
	n1 := c.nodes[0]
	broken := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(broken, b[:len(b)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := runNode(t, t.TempDir(), append(n1.args, "-restore", broken)...)
	wantOneLine(t, stderr, broken, "ends behind")
	left, err := os.ReadDir(n1.data)
	if code != 1 || err != nil || len(left) != 1 || left[0].Name() != "lock" {
		t.Errorf("exit status %d; %v are left (%v)", code, left, err)
	}
	// One that was cut off leaves a directory that does not start, and is done again.
	for _, name := range []string{"restoring", "raft.db", "identity"} {
		if err := os.WriteFile(filepath.Join(n1.data, name), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	code, _, stderr = runNode(t, t.TempDir(), n1.args...)
	if wantOneLine(t, stderr, "restore again", "-restore"); code != 1 {
		t.Errorf("a directory that is half restored: exit status %d", code)
	}
	code, out, stderr := runNode(t, t.TempDir(), append(n1.args, "-restore", file)...)
	if code != 0 || stderr != "" || !strings.Contains(out, "revision 4, 3 keys, 4 events") || !strings.Contains(out, "revision 1000000004,") {
		t.Fatalf("exit status %d: %s%s", code, out, stderr)
	}
	code, _, stderr = runNode(t, t.TempDir(), append(n1.args, "-restore", file)...)
	if wantOneLine(t, stderr, "not empty"); code != 1 {
		t.Errorf("a second time: exit status %d", code)
	}
	n1.start()
	until(t, 15*time.Second, n1.ready)
	c.nodes[1].start()
	c.nodes[2].start()
	c.ready()
	st := c.converge() // the two others were added, which the trail says
	if st.Revision < 1_000_000_004 || st.Revision > 1_000_000_010 {
		t.Errorf("the new cluster is at revision %d", st.Revision)
	}
	n3 := c.nodes[2]
	if e := n3.get(t, "app", "k"); e.Value != "one" || e.Revision != 1 {
		t.Errorf("app/k is %+v", e)
	}
	trail := n3.trail(t, "app")
	if last := trail[len(trail)-1]; last.Action != "store.restore" || last.Actor != "confman -restore" || last.Revision != 1_000_000_004 {
		t.Errorf("the trail ends with %+v", last)
	}
	for header, status := range map[string]int{"4-0": 200, "5-0": 410, "9-0": 410, "1000000003-0": 410, "1000000004-0": 200, fmt.Sprint(st.Revision+1, "-0"): 410} {
		s, a, err := openStream(n3, "app", "", "Last-Event-ID", header)
		if s != nil {
			a = &answer{status: 200}
			if header == "4-0" {
				if f, err := s.next(); err != nil || f.id != "1000000004-0" {
					t.Errorf("behind 4-0 comes %+v (%v)", f, err)
				}
			}
			s.close()
		}
		if err != nil || a.status != status || status == 410 && a.slug() != "gone" {
			t.Errorf("a stream from %s: %v (%v), want %d", header, a, err, status)
		}
	}
	if s, a, err := openStream(n3, "", "?since=77"); s != nil || err != nil || a.status != 410 {
		t.Errorf("a stream since 77: %v, %v", a, err)
	}
	if e := n3.put(t, "app", "k", "after"); e.Revision != st.Revision+1 || e.Version != 2 {
		t.Errorf("a write makes %+v", e)
	}
	n3.verified(t)
}

// TestRestoreBesideOld makes a new cluster of a backup while nodes of the one before run, with their data and
// under the same ids and secret: the new one neither follows them nor takes anything of their log for its own.
func TestRestoreBesideOld(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, calm)
	c.expects = append(c.expects, "would lead this one", "failed to appendEntries", "failed to heartbeat", "peer has newer term", "failed to get log",
		"failed to decode incoming command", "failed to make requestVote", "another node's trail differs")
	leader := c.leader()
	leader.put(t, "app", "k", "one")
	file := filepath.Join(t.TempDir(), "backup")
	if err := os.WriteFile(file, leader.backup(t).body, 0o600); err != nil {
		t.Fatal(err)
	}
	leader.put(t, "app", "k", "two")
	c.converge()
	n := c.followers()[0]
	n.stop()
	if err := os.RemoveAll(n.data); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := runNode(t, t.TempDir(), append(n.args, "-restore", file)...); code != 0 {
		t.Fatal(stderr)
	}
	n.start()
	until(t, 15*time.Second, n.ready)
	until(t, 15*time.Second, func() error {
		if said := n.logged(); !strings.Contains(said, "a node of another cluster would lead this one") {
			return errors.New("the log does not say that another leads")
		}
		return nil
	})
	until(t, 15*time.Second, func() error { // the old ones go on without it
		var a *answer
		for _, old := range c.nodes {
			if old == n {
				continue
			}
			if a = old.ask(t, "PUT", keyPath("app", "k"), `{"value":"three"}`); a.status == http.StatusOK {
				return nil
			}
		}
		return fmt.Errorf("a write at the old cluster: %v", a)
	})
	time.Sleep(time.Second)
	until(t, 15*time.Second, func() error {
		_, st, err := n.status()
		if err == nil && (st.Role != "leader" || st.Revision != 1_000_000_001) {
			err = fmt.Errorf("the new cluster is at revision %d, and its node is %s", st.Revision, st.Role)
		}
		return err
	})
	if e := n.get(t, "app", "k"); e.Value != "one" || e.Revision != 1 {
		t.Errorf("app/k is %+v", e)
	}
	for _, old := range c.nodes {
		if old != n {
			old.kill() // one that is left alone may end by itself, as no majority has its trail
			if err := os.RemoveAll(old.data); err != nil {
				t.Fatal(err)
			}
			old.start()
		}
	}
	c.ready()
	if st := c.converge(); st.Revision < 1_000_000_001 {
		t.Errorf("at revision %d", st.Revision)
	}
	n.verified(t)
}

// TestSnapshotBack: a snapshot that would take back what was applied is refused.
func TestSnapshotBack(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "1"), set("app", "k", "2"))
	n := &raftNode{id: "node1", store: w.st}
	if err := n.stranger(raft.RPC{Command: &raft.InstallSnapshotRequest{LastLogIndex: w.st.at().index - 1}}); err == nil {
		t.Error("a snapshot of what was before is taken")
	}
}

// TestSlowBackup: while clients take backups at 10 KB/s, writes take at most twice as long, and what they
// get is the state of one revision.
func TestSlowBackup(t *testing.T) {
	long(t)
	const pace, window = 5 * time.Millisecond, 60 * time.Second // a client that was taken for dead is cut by then
	c := startCluster(t, 3, steady)
	preload(t, c)
	leader := c.leader()
	type write struct {
		key   string
		value string
	}
	made := map[uint64]write{}
	var mu sync.Mutex // protects made and took
	var took []time.Duration
	quit := make(chan struct{})
	var wg sync.WaitGroup
	const writers = 4
	for w := range writers {
		wg.Go(func() {
			tick := time.NewTicker(writers * pace) // 200 writes a second in all
			defer tick.Stop()
			for i := 0; ; i++ {
				select {
				case <-quit:
					return
				case <-tick.C:
				}
				key, value := fmt.Sprintf("w%d/k%d", w, i%50), fmt.Sprint(w, " ", i, strings.Repeat("x", 200))
				start := time.Now()
				e := leader.put(t, "load", key, value)
				mu.Lock()
				took = append(took, time.Since(start))
				made[e.Revision] = write{key, value}
				mu.Unlock()
			}
		})
	}
	defer wg.Wait()
	defer close(quit)
	take := func() []time.Duration {
		mu.Lock()
		defer mu.Unlock()
		all := took
		took = nil
		return all
	}
	time.Sleep(2 * time.Second) // the load's beginning
	take()
	var with, without []time.Duration
	for range 2 {
		time.Sleep(window / 2) // without
		without = append(without, take()...)
		resp, err := streaming.Do(mustRequest(t, "GET", leader.url+"/api/v1/backup?stale"))
		if err != nil {
			t.Fatal(err)
		}
		first := time.Now()
		var b bytes.Buffer
		for time.Since(first) < window {
			if _, err := io.CopyN(&b, resp.Body, 1000); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Until(first.Add(time.Duration(b.Len()) * time.Second / 10_000))) // the client's pace
		}
		with = append(with, take()...)
		if _, err := io.Copy(&b, resp.Body); err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		take()
		h, sp, db, err := readBackup(&b, func(size int64) (*spool, error) { return newSpool(t.TempDir(), size, 0) })
		if err != nil {
			t.Fatal(err)
		}
		got := modelOf(t, db.View)
		db.Close()
		sp.f.Close()
		want := map[string]string{}
		mu.Lock()
		for rev, newest := uint64(1), h.revision; rev <= newest; rev++ {
			if w, ok := made[rev]; ok {
				want[string(entryKey("load", w.key))] = w.value
			}
		}
		mu.Unlock()
		if len(got.entries) != benchKeys()+len(want) {
			t.Errorf("the backup has %d entries, want %d", len(got.entries), benchKeys()+len(want))
		}
		for k, v := range want {
			if got.entries[k][0] != v {
				t.Errorf("at revision %d %q is %.20q, want %.20q", h.revision, k, got.entries[k][0], v)
			}
		}
		t.Logf("a backup of revision %d, %d bytes", h.revision, h.size)
	}
	slices.Sort(with)
	slices.Sort(without)
	t.Logf("p99 %v with a backup (%d writes, slowest %v), %v without (%d, %v)", quantile(with, 0.99), len(with), with[len(with)-1],
		quantile(without, 0.99), len(without), without[len(without)-1])
	if a, b := quantile(with, 0.99), quantile(without, 0.99); a > 2*b {
		t.Errorf("the p99 of writes is %v with a backup and %v without", a, b)
	}
}

func mustRequest(tb testing.TB, method, url string) *http.Request {
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		tb.Fatal(err)
	}
	req.Header.Set("X-API-Key", adminKey)
	return req
}

// TestRestoreLarge measures how long writes stand still while 100,000 keys are restored.
func TestRestoreLarge(t *testing.T) {
	long(t)
	c := startCluster(t, 3, steady)
	leader := c.leader()
	empty := leader.backup(t).body
	preload(t, c)
	full := leader.backup(t).body
	patient := &http.Client{Transport: transport, Timeout: 5 * time.Minute}
	for _, m := range []struct {
		what    string
		b       []byte
		changed int
	}{{"nothing differs", full, 0}, {"all keys go", empty, benchKeys()}, {"all keys are new", full, benchKeys()}} {
		var slowest, total atomic.Int64
		quit := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-quit:
					return
				default:
				}
				start := time.Now()
				// A write to what no backup has would be one change more.
				if a, err := do("PATCH", leader.url+"/api/v1/config/bench", adminKey, `{"missing":null}`); err != nil || a.status != http.StatusOK {
					t.Errorf("a write: %v, %v", a, err)
				}
				slowest.Store(max(slowest.Load(), int64(time.Since(start))))
				total.Add(1)
			}
		})
		start := time.Now()
		a, err := doWith(patient, "PUT", leader.url+"/api/v1/backup", adminKey, string(m.b))
		took := time.Since(start)
		close(quit)
		wg.Wait()
		if err != nil || a.status != http.StatusOK || !bytes.Contains(a.body, fmt.Appendf(nil, `"changed":%d}`, m.changed)) {
			t.Fatalf("%s: %v (%v)", m.what, a, err)
		}
		t.Logf("%s: %v for %d bytes; of %d writes meanwhile the slowest took %v", m.what, took, len(m.b), total.Load(), time.Duration(slowest.Load()))
	}
	leader.verified(t)
}

// TestRestoreUnderLoad restores into a cluster that is written to, while clients go from stream to stream:
// no event is missing, none comes twice, no node's revision goes back.
func TestRestoreUnderLoad(t *testing.T) {
	long(t)
	const listeners, writers, restores = 12, 4, 6
	c := startCluster(t, 3)
	ctx, cancel := context.WithCancel(t.Context())
	var heard, wrote sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wrote.Wait()
		heard.Wait()
	})
	spaces := []string{"s0", "s1"}
	for _, ns := range spaces {
		c.nodes[0].put(t, ns, "first", "v")
	}
	var all []*listener
	for i := range listeners {
		l := &listener{nodes: c.nodes, rng: rand.New(rand.NewPCG(1, uint64(i)))}
		if i%3 > 0 {
			l.ns = spaces[i%3-1]
		}
		all = append(all, l)
		heard.Go(func() { l.follow(ctx) })
	}
	var done atomic.Int64
	for w := range writers {
		rng := rand.New(rand.NewPCG(2, uint64(w)))
		wrote.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				n, ns := c.nodes[rng.IntN(3)], spaces[rng.IntN(2)]
				if a, err := doWith(following, "PUT", n.url+keyPath(ns, fmt.Sprintf("w%d/k%d", w, i%40)), adminKey, fmt.Sprintf(`{"value":"%d"}`, i)); err == nil && a.status/100 == 2 {
					done.Add(1)
				}
			}
		})
	}
	for _, n := range c.nodes {
		wrote.Go(func() {
			for last := uint64(0); ctx.Err() == nil; time.Sleep(5 * time.Millisecond) { // the pace of the question
				_, st, err := n.status()
				if err == nil && st.Revision < last {
					t.Errorf("%s goes from revision %d to %d", n.id, last, st.Revision)
				}
				last = max(last, st.Revision)
			}
		})
	}
	written := func(n int64) {
		t.Helper()
		until(t, limit(60*time.Second), func() error {
			if got := done.Load(); got < n {
				return fmt.Errorf("%d changes are made, want %d", got, n)
			}
			return nil
		})
	}
	written(200)
	backups := [][]byte{c.leader().backup(t).body}
	last := uint64(0)
	for i := range restores {
		written(int64(400 * (i + 1)))
		backups = append(backups, c.nodes[i%3].backup(t).body)
		rev, changed := c.nodes[(i+1)%3].restore(t, backups[i/2])
		if rev <= last || changed == 0 {
			t.Errorf("restore %d: revision %d behind %d, %d changes", i, rev, last, changed)
		}
		last = rev
		if i == restores/2 {
			old := c.leader()
			old.kill()
			c.leader()
			old.start()
			c.ready()
		}
	}
	written(int64(400 * (restores + 1)))
	sofar := c.leader().trail(t, "") // a look at what the listeners must have, at least
	until(t, limit(30*time.Second), func() error {
		for _, l := range all {
			if count, _ := l.count(); count == 0 {
				return errors.New("a listener has heard nothing")
			}
		}
		return nil
	})
	wanted := sofar[len(sofar)-1].Revision
	until(t, limit(30*time.Second), func() error {
		for _, l := range all {
			_, id := l.count()
			var rev uint64
			if fmt.Sscanf(id, "%d-", &rev); rev < wanted {
				return fmt.Errorf("a listener to %q has come to %d of %d", l.ns, rev, wanted)
			}
		}
		return nil
	})
	cancel()
	wrote.Wait()
	heard.Wait()
	c.converge()
	want := map[string][]string{}
	for _, e := range c.nodes[0].trail(t, "") {
		for _, ns := range append([]string{""}, spaces...) {
			if ns == "" || e.Namespace == ns || e.Action == "store.restore" {
				want[ns] = append(want[ns], e.ID)
			}
		}
	}
	for _, l := range all {
		ids := want[l.ns][:slices.Index(want[l.ns], l.ids[len(l.ids)-1])+1] // it was stopped there
		if missing, twice, wrongOrder := countIDs(ids, l.ids); l.wrong != nil || missing+twice+wrongOrder > 0 {
			t.Errorf("a listener to %q: %d missing, %d twice, %d out of order (%v)", l.ns, missing, twice, wrongOrder, l.wrong)
		}
	}
	for _, n := range c.nodes {
		n.verified(t)
	}
	t.Logf("%d writes, %d restores, %d events", done.Load(), restores, len(want[""]))
}

// TestRestoreKilled: a leader that is killed in the middle of a restore has made it whole or not at all,
// and nothing of it is left in the state.
func TestRestoreKilled(t *testing.T) {
	long(t)
	c := startCluster(t, 3)
	const keys = 10_000
	fill := func(value string) {
		for first := 0; first < keys; first += 2500 {
			body := []byte("{")
			for k := first; k < first+2500; k++ {
				body = fmt.Appendf(body, "\"k%05d\":\"%s%s\",", k, value, strings.Repeat("x", 200))
			}
			body[len(body)-1] = '}'
			if a := c.leader().write(t, "PATCH", "/api/v1/config/app", string(body)); a.status != http.StatusOK {
				t.Fatal(a)
			}
		}
	}
	fill("a")
	b := c.leader().backup(t).body
	whole, not := 0, 0
	for round := range 12 {
		fill("b" + fmt.Sprint(round))
		leader := c.leader()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			doWith(client, "PUT", leader.url+"/api/v1/backup", adminKey, string(b)) // its outcome is looked up
		}()
		time.Sleep(time.Duration(round) * 80 * time.Millisecond) // how far it comes
		leader.kill()
		<-ended
		c.leader()
		leader.start()
		c.ready()
		c.converge()
		values := map[string]int{}
		for _, raw := range c.leader().items(t, "/api/v1/config/app", map[string][]string{"consistent": {""}}) {
			var e entryDoc
			if err := json.Unmarshal(raw, &e); err != nil {
				t.Fatal(err)
			}
			values[strings.TrimRight(e.Value, "x")]++
		}
		switch {
		case len(values) == 1 && values["a"] == keys:
			whole++
		case len(values) == 1 && values["b"+fmt.Sprint(round)] == keys:
			not++
		default:
			t.Errorf("round %d: %v", round, values)
		}
	}
	t.Logf("%d were whole, %d not made", whole, not)
	if whole == 0 || not == 0 {
		t.Errorf("%d were whole, %d not made: too early or too late", whole, not)
	}
	c.finish()
	for _, n := range c.nodes {
		db, err := bbolt.Open(filepath.Join(n.data, "state.db"), 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if err := db.View(func(tx *bbolt.Tx) error {
			if tx.Bucket([]byte("staging")) != nil {
				return errors.New("something is staged still")
			}
			return nil
		}); err != nil {
			t.Errorf("%s: %v", n.id, err)
		}
	}
}
