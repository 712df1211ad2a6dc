package main

// What SIGHUP does, and what becomes of what keys hold.

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// keySpan is how long what a key holds may go on after the key is gone.
const keySpan = time.Second

// A holder is a stream and a wait that one key holds on one node.
type holder struct {
	tb     testing.TB
	n      *node
	key    string
	stream *stream
	events chan error   // nil for an event, at last why there are no more
	waited chan *answer // of the wait
}

// hold opens a stream of a namespace and a wait for its key awaited, which is not there.
func hold(tb testing.TB, n *node, ns, key string) *holder {
	tb.Helper()
	s, a, err := openStream(n, ns, "", "X-API-Key", key)
	if err != nil || a != nil {
		tb.Fatalf("a stream of %s on %s: %v, %v", ns, n.id, a, err)
	}
	tb.Cleanup(s.close)
	h := &holder{tb, n, key, s, make(chan error, 100), make(chan *answer, 1)}
	go func() {
		for {
			_, err := s.next()
			h.events <- err
			if err != nil {
				return
			}
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	tb.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, "GET", n.url+keyPath(ns, "awaited")+"?wait=1m", nil)
	if err != nil {
		tb.Fatal(err)
	}
	req.Header.Set("X-API-Key", key)
	go func() {
		resp, err := streaming.Do(req)
		if err != nil {
			return // the test is over
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		a := &answer{resp.StatusCode, resp.Header, text}
		documented("GET", req.URL.RequestURI(), a) // an error fails the run
		h.waited <- a
	}()
	return h
}

// ends expects both to be over within keySpan of since, the stream in order and the wait with status.
func (h *holder) ends(since time.Time, status int) {
	h.tb.Helper()
	over := time.After(time.Until(since.Add(limit(keySpan))))
	for err := error(nil); err == nil; {
		select {
		case err = <-h.events:
			if err != nil && err != io.EOF {
				h.tb.Errorf("the stream on %s ends with %v", h.n.id, err)
			}
		case <-over:
			h.tb.Errorf("the stream on %s goes on", h.n.id)
			return
		}
	}
	select {
	case a := <-h.waited:
		if a.status != status || (a.header.Get("WWW-Authenticate") != "") != (status == http.StatusUnauthorized) {
			h.tb.Errorf("the wait on %s is answered %v, want %d", h.n.id, a, status)
		}
	case <-over:
		h.tb.Errorf("the wait on %s goes on", h.n.id)
	}
}

// goesOn expects both to tell that the key has been made.
func (h *holder) goesOn() {
	h.tb.Helper()
	over := time.After(limit(10 * time.Second))
	select {
	case err := <-h.events:
		if err != nil {
			h.tb.Errorf("the stream on %s has ended: %v", h.n.id, err)
		}
	case <-over:
		h.tb.Errorf("the stream on %s tells of no change", h.n.id)
	}
	select {
	case a := <-h.waited:
		if a.status != http.StatusOK {
			h.tb.Errorf("the wait on %s is answered %v", h.n.id, a)
		}
	case <-over:
		h.tb.Errorf("the wait on %s tells of no change", h.n.id)
	}
}

// TestRevoked: what a key holds ends within a second when SIGHUP finds that the key is gone, or may
// not have it any more, and when the key expires. What other keys hold goes on, and so does what a
// key holds that was changed and may still have it.
func TestRevoked(t *testing.T) {
	t.Parallel()
	key := func(name string) string { return "cm_test_" + name + "_Xc7mPa2s" }
	c := newCluster(t, 2, calm)
	for _, name := range []string{"gone", "narrowed", "renamed", "expiring", "staying"} {
		c.configure(addKey(key(name), name, "reader"))
	}
	c.start()
	c.nodes[0].put(t, "held", "k", "v")
	c.converge()
	held := map[string][]*holder{}
	for _, n := range c.nodes {
		for _, name := range []string{"gone", "narrowed", "renamed", "expiring", "staying"} {
			held[name] = append(held[name], hold(t, n, "held", key(name)))
		}
	}

	notAfter := time.Now().Add(2 * time.Second)
	c.configure(dropKey("gone"), dropKey("narrowed"), dropKey("renamed"), dropKey("expiring"),
		addKey(fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(key("narrowed")))), "narrowed", "admin", "Namespaces", []string{"hel", "held-*"}),
		addKey(fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(key("renamed")))), "other name", "reader", "Namespaces", []string{"hel*"}),
		addKey(key("expiring"), "expiring", "reader", "NotAfter", notAfter.Format(time.RFC3339Nano)))
	for i, n := range c.nodes {
		since := time.Now()
		n.signal(syscall.SIGHUP)
		held["gone"][i].ends(since, http.StatusUnauthorized)
		held["narrowed"][i].ends(since, http.StatusForbidden)
	}
	for i, n := range c.nodes {
		held["expiring"][i].ends(notAfter, http.StatusUnauthorized)
		if time.Now().Before(notAfter) {
			t.Errorf("what a key held on %s has ended before it expires", n.id)
		}
		a, err := do("GET", n.url+keyPath("held", "k"), key("expiring"), "")
		if err != nil || a.status != http.StatusUnauthorized || !strings.Contains(string(a.body), "expired") {
			t.Errorf("%s answers a key that expired %v, %v", n.id, a, err)
		}
		if log := n.logged(); strings.Count(log, `msg="an API key has expired" `) != 1 {
			t.Errorf("the log of %s does not say once that a key has expired", n.id)
		}
	}
	c.nodes[0].put(t, "held", "awaited", "v")
	for _, name := range []string{"renamed", "staying"} {
		for _, h := range held[name] {
			h.goesOn()
		}
	}
}

// A stuck client takes nothing: a write to it lasts until its deadline.
type stuck struct {
	*httptest.ResponseRecorder
	mu    sync.Mutex // guards until
	until time.Time
}

func (s *stuck) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.until = t
	return nil
}

func (s *stuck) Write([]byte) (int, error) {
	for {
		s.mu.Lock()
		over := !time.Now().Before(s.until)
		s.mu.Unlock()
		if over {
			return 0, os.ErrDeadlineExceeded
		}
		time.Sleep(time.Millisecond) // of the bubble
	}
}

// TestRevokedStuck: a client that takes nothing keeps its stream no longer than others when its key
// is gone, and as long as ever when another one is.
func TestRevokedStuck(t *testing.T) {
	t.Parallel()
	other := apiKey{Key: readerKey, Name: "Service", Role: "reader"}
	operators := apiKey{Key: adminKey, Name: "Operators", Role: "admin"}
	for _, m := range []struct {
		name string
		keys []apiKey // after 5 seconds
		want time.Duration
	}{
		{"its key", []apiKey{other}, 5*time.Second + refusedTime},
		{"another key", []apiKey{operators}, writeTime},
		{"its name", []apiKey{{Key: adminKey, Name: "Others", Role: "reader"}}, writeTime},
	} {
		dir := t.TempDir()
		synctest.Test(t, func(t *testing.T) {
			w := newWriter(t, dir)
			w.apply(set("app", "k", "v"))
			s := newReader(t, w)
			s.setKeys([]apiKey{operators, other})
			r := httptest.NewRequest("GET", "/api/v1/audit/app?stale", nil)
			r.Header.Set("X-API-Key", adminKey)
			r.Header.Set("Accept", "text/event-stream")
			start, ended := time.Now(), make(chan time.Time)
			go func() {
				defer func() {
					if p := recover(); p != http.ErrAbortHandler {
						t.Errorf("the stream is not cut, %v", p)
					}
					ended <- time.Now()
				}()
				s.ServeHTTP(&stuck{ResponseRecorder: httptest.NewRecorder()}, r)
			}()
			time.Sleep(5 * time.Second)
			s.setKeys(m.keys)
			if took := (<-ended).Sub(start); took < m.want || took > m.want+10*time.Millisecond {
				t.Errorf("%s: the stream ends after %v, want %v", m.name, took, m.want)
			}
		})
	}
}

// TestClockSetBack: a key that has expired stays so when the clock is set back, since what it held has
// ended, until the file is read again.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	s := newReader(t, newWriter(t, t.TempDir()))
	keys := []apiKey{{Key: adminKey, Name: "Operators", Role: "admin", notAfter: time.Now().Add(-time.Hour)}}
	s.setKeys(keys)
	if s.auth.Load().endExpired(s) {
		t.Error("more keys will expire")
	}
	status := func(want int) {
		t.Helper()
		r, rec := httptest.NewRequest("GET", "/api/v1/namespaces?stale", nil), httptest.NewRecorder()
		r.Header.Set("X-API-Key", adminKey)
		if s.ServeHTTP(rec, r); rec.Code != want {
			t.Errorf("the key is answered %d, want %d", rec.Code, want)
		}
	}
	status(http.StatusUnauthorized)
	keys[0].notAfter = time.Now().Add(time.Hour) // as the old clock says of an hour ago
	s.auth.Load().keys[0].notAfter = keys[0].notAfter
	status(http.StatusUnauthorized)
	s.setKeys(keys)
	status(http.StatusOK)
}

// TestRotation: keys are rotated on a running cluster under load. The new one is added on every node,
// the clients move over, the old one is removed: no write fails, and the old key gets nothing any more.
func TestRotation(t *testing.T) {
	t.Parallel()
	const oldKey, nextKey = "cm_test_rotated_Lb4vKe8u", "cm_test_rotated_Sy0jDf5n"
	c := startCluster(t, 3, calm, addKey(oldKey, "old", "admin"))
	c.nodes[0].put(t, "held", "k", "v")
	c.converge()
	load := startLoad(c, 4)
	load.useKey(oldKey)
	load.more(limit(10*time.Second), 50)
	everywhere := func(e edit) {
		t.Helper()
		c.configure(e)
		for _, n := range c.nodes {
			if lines := n.reload(); !strings.Contains(lines, readAgain) {
				t.Fatalf("%s: %s", n.id, lines)
			}
			load.more(limit(10*time.Second), 10)
		}
	}
	var before, after []*holder
	for _, n := range c.nodes {
		before = append(before, hold(t, n, "held", oldKey))
	}
	everywhere(addKey(fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(nextKey))), "next", "admin"))
	load.useKey(nextKey)
	for _, n := range c.nodes {
		after = append(after, hold(t, n, "held", nextKey))
	}
	load.more(limit(10*time.Second), 50)
	c.configure(dropKey("old"))
	for i, n := range c.nodes {
		since := time.Now()
		n.signal(syscall.SIGHUP)
		before[i].ends(since, http.StatusUnauthorized)
		load.more(limit(10*time.Second), 10)
	}
	for _, n := range c.nodes {
		for _, method := range []string{"GET", "HEAD", "PUT", "DELETE"} {
			a, err := do(method, n.url+keyPath("load", "k"), oldKey, `{"value":"v"}`)
			if err != nil || a.status != http.StatusUnauthorized {
				t.Errorf("%s with the old key on %s: %v, %v", method, n.id, a, err)
			}
		}
	}
	c.nodes[0].put(t, "held", "awaited", "v")
	for _, h := range after {
		h.goesOn()
	}
	load.end()
	if len(load.unknown) > 0 {
		t.Errorf("writes of unknown outcome: %v", load.unknown)
	}
	load.check() // it also complains of what was refused
}

// TestReload: SIGHUP puts the keys of the file into effect, all or none, names what waits for the
// next start, and reads the file as the start did, with the flags that replace its members.
func TestReload(t *testing.T) {
	t.Parallel()
	const nextKey = "cm_test_next_Vr2bHs6x"
	c := newCluster(t, 1)
	n := c.nodes[0]
	n.args = append(n.args, "-data", "elsewhere")
	n.data = filepath.Join(c.dir, "elsewhere", n.id)
	// A node that starts is not ended by it either, from the first thing on that it does.
	n.start()
	until(t, 10*time.Second, func() error {
		if _, err := os.Stat(filepath.Join(n.data, "lock")); err != nil {
			return err
		}
		n.signal(syscall.SIGHUP)
		return n.ready()
	})
	until(t, 10*time.Second, func() error {
		if !strings.Contains(n.logged(), readAgain+" node=node1 keys=2 secrets=0\n") {
			return errors.New("a node that was sent SIGHUP while it started does not read its configuration again")
		}
		return nil
	})
	n.stop() // and with it signals that it has not answered yet
	n.start()
	c.ready()
	status := func(key string, want int) {
		t.Helper()
		if a, err := do("GET", n.url+"/api/v1/namespaces", key, ""); err != nil || a.status != want {
			t.Errorf("key %q is answered %v, %v, want %d", key, a, err, want)
		}
	}

	c.expects = append(c.expects, notReadAgain)
	keys := c.doc["Auth"].(map[string]any)["ApiKeys"].([]any)
	next := addKey(nextKey, "next", "reader")
	for _, m := range []struct {
		want string
		make edit
	}{
		{"Auth.ApiKeys[3].Role", addKey("cm_test_mistake", "mistake", "root")},
		{"Auth.ApiKeys[3].Key", addKey(fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(nextKey))), "twice", "reader")},
		{"Auth.ApiKeys", with("Auth", "ApiKeys", []any{})},
		{"Auth.ApiKeys[2].NotAfter", with("Auth", "ApiKeys", append(slices.Clone(keys), map[string]any{"Key": nextKey, "Name": "next", "Role": "reader", "NotAfter": "soon"}))},
		{"Storage.MinFreeMiB", with("Storage", "MinFreeMiB", -1)},
	} {
		c.configure(with("Auth", "ApiKeys", keys), next, m.make)
		lines := n.reload()
		if strings.Count(lines, "level=ERROR") != 1 || strings.Contains(lines, "level=WARN") || !strings.Contains(lines, c.config+": "+m.want+": ") {
			t.Errorf("a mistake in %s is told so: %s", m.want, lines)
		}
		status(nextKey, http.StatusUnauthorized)
		status(readerKey, http.StatusOK)
	}

	c.configure(with("Auth", "ApiKeys", keys), dropKey("Service"), next, with("Storage", "MinFreeMiB", 100), with("Storage", "DataPath", "unused"),
		with("Cluster", "MaxStaleness", 4000), with("Cluster", "Nodes", append(c.doc["Cluster"].(map[string]any)["Nodes"].([]any),
			map[string]any{"Id": "node2", "Address": "127.0.0.1", "ApiPort": 1, "RaftPort": 2})))
	const outstanding = `level=WARN msg="changed in the configuration file, but in effect after the next start only" node=node1 members="Cluster.Nodes Cluster.MaxStaleness Storage.MinFreeMiB"`
	for range 2 { // it is told until the next start
		if lines := n.reload(); !strings.Contains(lines, outstanding) || !strings.Contains(lines, "level=INFO "+readAgain+" node=node1 keys=2 secrets=0\n") {
			t.Errorf("after a change of keys and other members: %s", lines)
		}
	}
	status(nextKey, http.StatusOK)
	status(readerKey, http.StatusUnauthorized)
	status(adminKey, http.StatusOK)
}

// TestReadable: a configuration file that others can read and that holds a key in clear is told of,
// with what to do about it, at the start and when it is read again.
func TestReadable(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	n := c.nodes[0]
	const warning = `level=WARN msg="every user of this machine can read the configuration file, and it holds secrets in clear"`
	clear := fmt.Sprintf(`members="Auth.ApiKeys[0].Key Auth.ApiKeys[1].Key" do="chmod o-rwx %s"`, c.config)
	for _, mode := range []os.FileMode{0o640, 0o644} {
		if err := os.Chmod(c.config, mode); err != nil {
			t.Fatal(err)
		}
		lines := n.reload()
		if strings.Contains(lines, warning) != (mode == 0o644) || strings.Contains(lines, clear) != (mode == 0o644) {
			t.Errorf("a file of mode %o: %s", mode, lines)
		}
	}
	n.stop()
	n.start()
	c.ready()
	if got := strings.Count(n.logged(), warning); got != 2 {
		t.Errorf("it is told of %d times, want one when it is read again and one at the start: %s", got, n.logged())
	}
	var digests []any
	for _, k := range c.doc["Auth"].(map[string]any)["ApiKeys"].([]any) {
		k := maps.Clone(k.(map[string]any))
		k["Key"] = fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(k["Key"].(string))))
		digests = append(digests, k)
	}
	c.configure(with("Auth", "ApiKeys", digests))
	if lines := n.reload(); strings.Contains(lines, "level=WARN") {
		t.Errorf("with digests for keys: %s", lines)
	}
	n.put(t, "app", "k", "v")
}

// TestKeygen: -keygen prints a key and what makes it one of a configuration file; with the word secret,
// 32 bytes in base64. None is printed twice.
func TestKeygen(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	printed := func(args ...string) []string {
		t.Helper()
		code, stdout, stderr := runNode(t, dir, args...)
		if code != 0 || stderr != "" || !strings.HasSuffix(stdout, "\n") {
			t.Fatalf("%q: exit status %d, %q on standard error, %q", args, code, stderr, stdout)
		}
		return strings.Split(strings.TrimSuffix(stdout, "\n"), "\n")
	}
	keys := map[string]bool{}
	c := newCluster(t, 1)
	for _, args := range [][]string{{"-keygen"}, {"-keygen", "key"}} {
		lines := printed(args...)
		if len(lines) != 2 || !regexp.MustCompile(`^cm_[A-Za-z0-9_-]{43}$`).MatchString(lines[0]) || keys[lines[0]] {
			t.Fatalf("%q prints %q", args, lines)
		}
		keys[lines[0]] = true
		var k any
		if err := json.Unmarshal([]byte(lines[1]), &k); err != nil {
			t.Fatalf("%v in %s", err, lines[1])
		}
		c.configure(func(doc map[string]any) {
			auth := doc["Auth"].(map[string]any)
			auth["ApiKeys"] = append(auth["ApiKeys"].([]any), k)
		})
	}
	c.start()
	for key := range keys {
		for method, want := range map[string]int{"GET": http.StatusOK, "PUT": http.StatusForbidden} {
			path := map[string]string{"GET": "/api/v1/namespaces", "PUT": "/api/v1/namespaces/app"}[method]
			if a, err := do(method, c.nodes[0].url+path, key, ""); err != nil || a.status != want {
				t.Errorf("%s with a new key: %v, %v, want %d", method, a, err, want)
			}
		}
	}
	one, two := printed("-keygen", "secret"), printed("-keygen", "secret")
	if secret, err := base64.StdEncoding.DecodeString(one[0]); err != nil || len(secret) != 32 || len(one) != 1 || one[0] == two[0] {
		t.Errorf("-keygen secret prints %q and %q (%v)", one, two, err)
	}
	for _, m := range []struct{ args, want string }{
		{"-keygen password", "password"},
		{"-keygen key secret", "key secret"},
		{"-keygen -config confman.json", "-keygen"},
		{"-config confman.json -keygen", "-keygen"},
		{"-keygen key -node node1", "-node"},
	} {
		code, stdout, stderr := runNode(t, dir, strings.Fields(m.args)...)
		if code != 2 || stdout != "" {
			t.Errorf("%s: exit status %d, standard output %q, want 2 and nothing", m.args, code, stdout)
		}
		wantOneLine(t, stderr, m.want)
	}
}
