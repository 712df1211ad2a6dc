package main

// The port of the nodes among themselves, from the outside: who does not have the secret gets
// nowhere, and who has it is held to the node that he says he is.

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// otherSecret is not that of any cluster until one changes to it.
const otherSecret = "8d1f0c6a4be27395d08a1c5e7f3b6294c7e0a9d85b1432f6e4a7c8905d6b1f23"

// TestSecretForms: a secret is the same in each of its forms; what is none, or too short, is refused
// with the member's name and nothing of what stood there.
func TestSecretForms(t *testing.T) {
	t.Parallel()
	raw := make([]byte, 33) // base64 of it needs no padding, of the first 32 it does
	for i := range raw {
		raw[i] = byte(255 - i) // in base64 with both letters in which the alphabets differ
	}
	load := func(member string) (*config, error) {
		path := filepath.Join(t.TempDir(), "confman.json")
		text := strings.Replace(sample, `"Forward": false`, `"Forward": false, `+member, 1)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return loadConfig(path, "node1")
	}
	for _, size := range []int{32, 33} {
		for _, text := range []string{
			base64.StdEncoding.EncodeToString(raw[:size]), base64.RawStdEncoding.EncodeToString(raw[:size]),
			base64.URLEncoding.EncodeToString(raw[:size]), base64.RawURLEncoding.EncodeToString(raw[:size]),
			hex.EncodeToString(raw[:size]), strings.ToUpper(hex.EncodeToString(raw[:size])),
		} {
			c, err := load(`"Secret": "` + text + `"`)
			if err != nil || len(c.secrets) != 1 || string(c.secrets[0]) != string(raw[:size]) {
				t.Errorf("%s: %v, %v", text, c, err)
			}
		}
	}
	c, err := load(`"Secrets": ["` + otherSecret + `", "` + clusterSecret + `"]`)
	if err != nil || len(c.secrets) != 2 || hex.EncodeToString(c.secrets[0]) != otherSecret {
		t.Fatalf("two secrets: %v", err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x"} {
		if text := fmt.Sprintf(verb, c.secrets); strings.Contains(text, "8d1f") || strings.Contains(text, "141") {
			t.Errorf("%s shows a secret: %s", verb, text)
		}
	}
	const canary = "canaryCANARYcanary"
	for _, m := range []struct{ member, want string }{
		{`"Secret": ""`, "Cluster.Secret: "},
		{`"Secret": "` + canary + `"`, "Cluster.Secret: "},
		{`"Secret": "` + hex.EncodeToString(raw[:31]) + `"`, "Cluster.Secret: 31 bytes"},
		// As base64 these 60 letters would be 45 bytes.
		{`"Secret": "` + hex.EncodeToString(raw[:30]) + `"`, "Cluster.Secret: 30 bytes"},
		{`"Secret": "` + base64.StdEncoding.EncodeToString(raw[:31]) + `"`, "Cluster.Secret: 31 bytes"},
		{`"Secret": "` + strings.Repeat(canary, 3) + `!"`, "Cluster.Secret: neither"},
		{`"Secret": "` + clusterSecret + `\n"`, "Cluster.Secret: neither"},
		{`"Secret": 12345678901234567890123456789012`, "Cluster.Secret: wrong kind"},
		{`"Secrets": "` + clusterSecret + `"`, "Cluster.Secrets: wrong kind"},
		{`"Secrets": []`, "Cluster.Secrets: empty"},
		{`"Secrets": ["` + clusterSecret + `", "` + canary + `"]`, "Cluster.Secrets[1]: "},
		{`"Secrets": ["` + clusterSecret + `", "` + clusterSecret + `="]`, "Cluster.Secrets[1]: the same as Cluster.Secrets[0]"},
		{`"Secret": "` + clusterSecret + `", "Secrets": ["` + otherSecret + `"]`, "Cluster.Secrets: excludes Cluster.Secret"},
	} {
		_, err := load(m.member)
		if !errors.Is(err, errUsage) || !strings.Contains(err.Error(), m.want) {
			t.Errorf("%s: %v, want %s", m.member, err, m.want)
			continue
		}
		for _, part := range []string{"canary", "Canary", clusterSecret[:8], otherSecret[:8], "1234567890", hex.EncodeToString(raw[:8])} {
			if strings.Contains(err.Error(), part) {
				t.Errorf("%s: the error shows it: %v", m.member, err)
			}
		}
	}
}

// TestNodeKeys: what a secret makes never changes, or nodes of two versions would be strangers. The
// key was computed with OpenSSL.
func TestNodeKeys(t *testing.T) {
	t.Parallel()
	s, err := parseSecret("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
	if err != nil {
		t.Fatal(err)
	}
	var rings []*keyring
	for range 2 {
		k, err := newKeyring([]secret{s}, "node1")
		if err != nil {
			t.Fatal(err)
		}
		rings = append(rings, k)
	}
	const want = "5229eee86ad9fb8e9f81a23375efced32c5f5be9d7e0f7c9dff305bc8ff66a2b"
	key, err := hex.DecodeString(want)
	if err != nil || !rings[0].knows("node1", string(key)) || rings[0].knows("node2", string(key)) {
		t.Errorf("node1 has not the key %s: %x", want, s.nodeKey("node1").Public())
	}
	if !bytes.Equal(rings[0].own.Certificate[0], rings[1].own.Certificate[0]) {
		t.Error("a node's certificate differs from one time to the next")
	}
	if !bytes.Contains(rings[0].own.Certificate[0], []byte("99991231235959Z")) {
		t.Error("a node's certificate has an end")
	}
}

// keyringOf makes the keyring of node self, by secrets as a file has them.
func keyringOf(tb testing.TB, self string, secrets ...string) *keyring {
	tb.Helper()
	var all []secret
	for _, text := range secrets {
		s, err := parseSecret(text)
		if err != nil {
			tb.Fatal(err)
		}
		all = append(all, s)
	}
	k, err := newKeyring(all, self)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

// portOf is a port that calls nodes as their fellow self with these secrets does.
func portOf(tb testing.TB, self string, nodes []*node, secrets ...string) *port {
	tb.Helper()
	members := map[string]peer{}
	for _, n := range nodes {
		members[n.id] = peer{raft: n.raft}
	}
	p := newPort(self, nil, members, slog.New(slog.DiscardHandler))
	p.setRing(keyringOf(tb, self, secrets...))
	return p
}

// inquire asks a node as its fellow nodes do.
func inquire(p *port, id, method, path, body string, headers ...string) (*answer, error) {
	asker := newAsker(p, 1)
	defer asker.CloseIdleConnections()
	return doWith(&http.Client{Transport: asker, Timeout: 10 * time.Second}, method, "http://"+id+path, adminKey, body, headers...)
}

// another is the id of a fellow of n.
func another(n *node) string {
	if n.id == "node1" {
		return "node2"
	}
	return "node1"
}

// A road is raft's view of the connections that dial makes.
type road struct {
	net.Listener
	dial func() (net.Conn, error)
}

func (r road) Dial(raft.ServerAddress, time.Duration) (net.Conn, error) { return r.dial() }

// sayTerm sends the heartbeat of a leader in term 2^63, which raft, if it hears it, believes.
func sayTerm(tb testing.TB, dial func() (net.Conn, error)) error {
	tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	trans := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: road{ln, dial}, MaxPool: 1, MaxRPCsInFlight: 1, Timeout: 5 * time.Second, Logger: hclog.NewNullLogger(),
	})
	defer trans.Close()
	head := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte("node2"), Addr: []byte("node2")}
	var resp raft.AppendEntriesResponse
	return trans.AppendEntries("", "", &raft.AppendEntriesRequest{RPCHeader: head, Term: 1 << 63}, &resp)
}

// pour writes n bytes of the pattern, or as many as the other end takes.
func pour(c net.Conn, pattern []byte, n int) {
	block := bytes.Repeat(pattern, 1+(1<<20)/len(pattern))
	for sent := 0; sent < n; sent += len(block) {
		if _, err := c.Write(block); err != nil {
			return
		}
	}
}

// TestRaftPort attacks the Raft ports of a live cluster. Nothing reaches raft: the term stays, writes go
// on and a node that starts finds the others, and memory does not grow.
func TestRaftPort(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, calm)
	target, follower := c.leader(), c.followers()[0]
	ids := []string{"node1", "node2", "node3"}
	me := another(target)
	terms := func() (all []uint64) {
		for _, n := range c.nodes {
			_, st, err := n.status()
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, st.Term)
		}
		return all
	}
	load := startLoad(c, 2)
	load.more(limit(10*time.Second), 100)
	before := terms()
	small := map[*node]int{}
	for _, n := range c.nodes {
		small[n] = resident(t, n)
	}
	most, allowed := 0, 64<<20
	if raced {
		allowed *= 4
	}
	grown := func(during string) {
		t.Helper()
		for n, was := range small {
			if n != follower { // which is started anew
				now := resident(t, n)
				if most = max(most, now-was); now-was > allowed {
					t.Errorf("%s: %s has %d MB, it had %d", during, n.id, now>>20, was>>20)
				}
			}
		}
	}

	// by makes a TLS connection that shows k's certificate, if k is there, and takes any.
	by := func(k *keyring) func(net.Conn) net.Conn {
		conf := &tls.Config{InsecureSkipVerify: true}
		if k != nil {
			conf.Certificates = []tls.Certificate{k.own}
		}
		return func(c net.Conn) net.Conn { return tls.Client(c, conf) }
	}
	plain := func(c net.Conn) net.Conn { return c }
	sec, err := parseSecret(clusterSecret)
	if err != nil {
		t.Fatal(err)
	}
	mixed := &keyring{}
	if mixed.own, err = nodeCertificate(me, sec.nodeKey("node9")); err != nil {
		t.Fatal(err)
	}
	for _, who := range []struct {
		name string
		over func(net.Conn) net.Conn
	}{
		{"plain text", plain},
		{"TLS without a certificate", by(nil)},
		{"TLS with a certificate of another secret", by(keyringOf(t, me, otherSecret))},
		{"TLS with another node's key than the certificate names", by(mixed)},
		{"TLS with the called node's own key", by(keyringOf(t, target.id, clusterSecret))},
	} {
		call := func() (net.Conn, error) {
			conn, err := net.Dial("tcp", target.raft)
			if err != nil {
				return nil, err
			}
			conn.SetDeadline(time.Now().Add(limit(10 * time.Second)))
			return who.over(conn), nil
		}
		if err := sayTerm(t, call); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: a message of raft is answered with %v, want the connection cut", who.name, err)
		}
		for what, attack := range map[string]func(net.Conn){
			"a question":      func(c net.Conn) { io.WriteString(c, "GET /term HTTP/1.1\r\nHost: x\r\n\r\n") },
			"100 MB for raft": func(c net.Conn) { pour(c, append([]byte{0, 0xc6, 0x06, 0x40, 0, 0}, make([]byte, 1000)...), 100<<20) },
			"100 MB of TLS's records": func(c net.Conn) {
				pour(c, append([]byte{22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff}, make([]byte, 1<<14-4)...), 100<<20)
			},
		} {
			conn, err := call()
			if err != nil {
				t.Fatal(err)
			}
			attack(conn)
			heard, err := io.ReadAll(conn)
			if len(heard) > 7 || errors.Is(err, os.ErrDeadlineExceeded) { // TLS says goodbye in 7 bytes
				t.Errorf("%s, %s: heard %q, %v, want the connection cut", who.name, what, heard, err)
			}
			conn.Close()
		}
		grown(who.name)
	}

	// A call that reaches another node than the one that was meant.
	astray := portOf(t, me, []*node{{id: "node3", raft: target.raft}, {id: "node2", raft: target.raft}, {id: "node1", raft: target.raft}}, clusterSecret)
	for _, id := range ids {
		a, err := inquire(astray, id, "GET", "/term", "")
		if id != target.id && (err == nil || !strings.Contains(err.Error(), "that of node "+target.id)) {
			t.Errorf("a call for %s that reaches %s: %v, %v", id, target.id, a, err)
		}
		if id == target.id && (err != nil || a.status != http.StatusOK) {
			t.Errorf("a call for %s that reaches it: %v, %v", id, a, err)
		}
	}
	load.more(limit(10*time.Second), 100)

	// Connections that say nothing, from the nodes' own address, opened again when they are closed.
	ctx, end := context.WithCancel(t.Context())
	defer end()
	over := time.Now().Add(time.Duration(rounds(4, 30)) * time.Second)
	const crowd = 2000
	var cut atomic.Int64
	var idle sync.WaitGroup
	for range crowd {
		idle.Go(func() {
			for ctx.Err() == nil {
				conn, err := net.Dial("tcp", target.raft)
				if err != nil {
					t.Error(err)
					return
				}
				stop := context.AfterFunc(ctx, func() { conn.Close() })
				conn.Read(make([]byte, 1))
				if stop() {
					cut.Add(1)
				}
				conn.Close()
				select {
				case <-ctx.Done():
				case <-time.After(time.Second): // an attack, not a benchmark of it
				}
			}
		})
	}
	until(t, limit(10*time.Second), func() error {
		if got := cut.Load(); got < crowd-maxStrangers {
			return fmt.Errorf("%d of %d have been cut", got, crowd)
		}
		return nil
	})
	follower.kill()
	follower.start()
	until(t, limit(15*time.Second), follower.ready)
	load.more(limit(10*time.Second), 100)
	for time.Now().Before(over) {
		grown("idle connections")
		load.more(limit(10*time.Second), 20)
	}
	end()
	idle.Wait()
	grown("afterwards")
	t.Logf("memory grew by %d MB at most", most>>20)
	if d := cmp.Diff(before, terms()); d != "" {
		t.Errorf("the terms (-before +after):\n%s", d)
	}
	load.check()

	// The same message from a node is heard, so it would have been.
	friend := portOf(t, me, c.nodes, clusterSecret)
	if err := sayTerm(t, func() (net.Conn, error) { return friend.dial(t.Context(), target.id) }); err != nil {
		t.Fatal(err)
	}
	if _, st, err := target.status(); err != nil || st.Term < 1<<63 {
		t.Errorf("a node said that the term is 2^63, and it is %d (%v)", st.Term, err)
	}
	c.ready()
}

// TestCrowd: when too many strangers wait, those of the address that has most of them lose the oldest,
// and no others. No stranger may say much, or wait for ever.
func TestCrowd(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := newPort("node1", ln, nil, slog.New(slog.DiscardHandler))
	defer p.Close()
	p.setRing(keyringOf(t, "node1", clusterSecret))
	go p.accept()
	waiting := func() int {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.strangers)
	}
	connect := func(host string) net.Conn {
		t.Helper()
		conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(host)}}).Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	silent := func(conn net.Conn) bool {
		conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		_, err := conn.Read(make([]byte, 1))
		return errors.Is(err, os.ErrDeadlineExceeded)
	}
	// A first message of 64 KiB, of which half comes.
	long := connect("127.0.0.4")
	long.Write(bytes.Repeat(append([]byte{22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff}, make([]byte, 1<<14-4)...), 2))
	long.SetReadDeadline(time.Now().Add(4 * time.Second))
	if heard, err := io.ReadAll(long); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("who sends %d bytes before he is known hears %q, %v, want the connection cut", 2<<14, heard, err)
	}
	first := connect("127.0.0.2") // the oldest of all
	var crowd []net.Conn
	for range maxStrangers + 10 {
		crowd = append(crowd, connect("127.0.0.3"))
	}
	until(t, limit(4*time.Second), func() error {
		if got := waiting(); got != maxStrangers {
			return fmt.Errorf("%d wait", got)
		}
		for i, conn := range crowd[:11] {
			if silent(conn) {
				return fmt.Errorf("connection %d of the crowd is open still", i)
			}
		}
		return nil
	})
	for name, conn := range map[string]net.Conn{"the one of another address": first, "the crowd's 12th": crowd[11], "the newest": crowd[len(crowd)-1]} {
		if !silent(conn) {
			t.Errorf("%s was closed", name)
		}
	}
	// Whoever knows the secret comes in.
	caller := portOf(t, "node2", []*node{{id: "node1", raft: ln.Addr().String()}}, clusterSecret)
	go func() { <-p.http }()
	conn, err := caller.dial(t.Context(), "node1")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	until(t, firstByteTime+limit(5*time.Second), func() error {
		if got := waiting(); got != 0 {
			return fmt.Errorf("%d wait still", got)
		}
		return nil
	})
	if silent(first) {
		t.Error("a stranger's connection is open for ever")
	}
}

// reread makes the node read its configuration file again and waits until its log has the line.
func (n *node) reread(tb testing.TB, line string) {
	tb.Helper()
	before := strings.Count(n.logged(), line)
	n.signal(syscall.SIGHUP)
	until(tb, 10*time.Second, func() error {
		if strings.Count(n.logged(), line) == before {
			return fmt.Errorf("the log of %s does not say %q again", n.id, line)
		}
		return nil
	})
}

// TestSecretRotation changes the secret of a cluster under load, in the manual's three steps. No write fails,
// and what the old secret opened is shut.
func TestSecretRotation(t *testing.T) {
	t.Parallel()
	const again = `msg="configuration file read again"`
	c := startCluster(t, 3, steady, with("Cluster", "Forward", true))
	_, before, err := c.leader().status()
	if err != nil {
		t.Fatal(err)
	}
	load := startLoad(c, 4)
	load.more(limit(10*time.Second), 50)

	// A mistake changes nothing.
	c.expects = append(c.expects, notReadAgain)
	c.configure(with("Cluster", "Secret", "short"))
	for _, n := range c.nodes {
		n.reread(t, notReadAgain)
	}
	load.more(limit(10*time.Second), 50)

	var old []net.Conn // by the old secret, made when it is about to go
	for _, secrets := range [][]string{{clusterSecret, otherSecret}, {otherSecret, clusterSecret}, {otherSecret}} {
		c.configure(plaintext, with("Cluster", "Secrets", secrets))
		if len(secrets) == 1 {
			for _, n := range c.nodes {
				conn, err := portOf(t, another(n), c.nodes, clusterSecret, otherSecret).dial(t.Context(), n.id)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				old = append(old, conn)
			}
		}
		for _, n := range c.nodes {
			n.reread(t, again)
			load.more(limit(10*time.Second), 50)
		}
	}
	for i, conn := range old {
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a connection to %s by the old secret is open still (%v)", c.nodes[i].id, err)
		}
	}
	for _, n := range c.nodes {
		if a, err := inquire(portOf(t, another(n), c.nodes, clusterSecret, otherSecret), n.id, "GET", "/term", ""); err == nil || !strings.Contains(err.Error(), "bad certificate") {
			t.Errorf("%s takes the old secret: %v, %v", n.id, a, err)
		}
		if a, err := inquire(portOf(t, another(n), c.nodes, otherSecret), n.id, "GET", "/term", ""); err != nil || a.status != http.StatusOK {
			t.Errorf("%s refuses the new secret: %v, %v", n.id, a, err)
		}
		if strings.Contains(n.logged(), otherSecret) {
			t.Errorf("the log of %s holds the secret", n.id)
		}
	}
	load.check()
	if len(load.unknown) > 0 {
		t.Errorf("%d writes of unknown outcome: %v", len(load.unknown), load.unknown)
	}
	if _, after, err := c.leader().status(); err != nil || after.Term != before.Term {
		t.Logf("the leader changed in between, from term %d to %d", before.Term, after.Term)
	}
	// It is in the file, too: a node that starts now is one of them.
	n := c.followers()[0]
	n.stop()
	n.start()
	c.ready()
}

// TestFirstSecret gives a running cluster a secret, as the manual says.
func TestFirstSecret(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, plaintext)
	n := c.nodes[0]
	n.put(t, "app", "k", "before")
	if a, err := inquire(portOf(t, another(n), c.nodes), n.id, "GET", "/term", ""); err != nil || a.status != http.StatusOK {
		t.Errorf("a question in plain text: %v, %v", a, err)
	}
	c.configure(with("Cluster", "Secret", clusterSecret))
	for _, n := range c.nodes {
		n.reread(t, `msg="configuration file read again"`)
	}
	for _, n := range c.nodes {
		until(t, 15*time.Second, func() error {
			if code, st, err := n.status(); err != nil || code != http.StatusOK || st.Transport != "tls" {
				return fmt.Errorf("%s: %d %+v, %v", n.id, code, st, err)
			}
			return nil
		})
		n.put(t, "app", "k", n.id)
		if a, err := inquire(portOf(t, another(n), c.nodes), n.id, "GET", "/term", ""); err == nil {
			t.Errorf("%s answers plain text still: %v", n.id, a)
		}
	}
}

// TestTransport: a node says in /health/ready how the nodes talk to each other, and warns at each start
// where others than this machine could hear it in plain text.
func TestTransport(t *testing.T) {
	t.Parallel()
	const line = `level=WARN msg="the nodes talk in plain text`
	for name, m := range map[string]struct {
		edits []edit
		want  string
		warns int // in two starts
	}{
		"loopback":          {nil, "plaintext", 0},
		"loopback by name":  {[]edit{with("Cluster", "Listen", "localhost")}, "plaintext", 0},
		"every address":     {[]edit{with("Cluster", "Listen", "0.0.0.0")}, "plaintext", 2},
		"elsewhere, secret": {[]edit{with("Cluster", "Listen", "0.0.0.0"), with("Cluster", "Secret", clusterSecret)}, "tls", 0},
		"another's address": {[]edit{with("Cluster", "Listen", "127.0.0.1"), func(doc map[string]any) {
			doc["Cluster"].(map[string]any)["Nodes"].([]any)[0].(map[string]any)["Address"] = "confman.example"
		}}, "plaintext", 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 1, m.edits...)
			n := c.nodes[0]
			for i := range 2 {
				if i > 0 {
					n.stop()
				}
				c.start()
				if _, st, err := n.status(); err != nil || st.Transport != m.want {
					t.Errorf("transport is %q (%v), want %q", st.Transport, err, m.want)
				}
			}
			if got := strings.Count(n.logged(), line); got != m.warns {
				t.Errorf("%d warnings, want %d", got, m.warns)
			}
		})
	}
}

// TestForwardedSource: the node that passes a write on is believed about where it came from if it has
// proved to be a node, and nobody else is.
func TestForwardedSource(t *testing.T) {
	t.Parallel()
	const client, forged = "127.0.0.9", "192.0.2.66"
	for name, m := range map[string]struct {
		edit   edit
		secret []string
		want   string // of a write that was passed on
		node   string // of one that comes over the Raft port with a source that it claims
	}{
		"tls":       {func(map[string]any) {}, []string{clusterSecret}, client, forged},
		"plaintext": {plaintext, nil, "127.0.0.1", "127.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := startCluster(t, 3, calm, m.edit, with("Cluster", "Forward", true))
			leader, f := c.leader(), c.followers()[0]
			wants := map[string]string{}
			put := func(key, want string, send func(path, body string, headers ...string) (*answer, error)) {
				t.Helper()
				a, err := send(keyPath("app", key), `{"value":"v"}`, "X-Correlation-Id", key, "Confman-Source", forged, "Confman-Forwarded", f.id)
				if err != nil || a.status != http.StatusCreated {
					t.Fatalf("PUT %s: %v, %v", key, a, err)
				}
				wants[key] = want
			}
			from := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
				DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(client)}}).DialContext}}
			put("leader", client, func(path, body string, headers ...string) (*answer, error) {
				return doWith(from, "PUT", leader.url+path, adminKey, body, headers...)
			})
			put("passed", m.want, func(path, body string, headers ...string) (*answer, error) {
				return doWith(from, "PUT", f.url+path, adminKey, body, headers[:4]...)
			})
			put("node", m.node, func(path, body string, headers ...string) (*answer, error) {
				return inquire(portOf(t, f.id, c.nodes, m.secret...), leader.id, "PUT", path, body, headers...)
			})
			got := map[string]string{}
			for _, e := range leader.trail(t, "app") {
				got[e.Key] = e.Source
			}
			if d := cmp.Diff(wants, got); d != "" {
				t.Errorf("sources (-want +got):\n%s", d)
			}
		})
	}
}
