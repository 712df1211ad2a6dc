package main

// Clients that wait: when they are woken, when they are not, and what they leave behind.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
)

// TestWait: ?wait on whatever has an ETag, at the leader and at followers.
func TestWait(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, calm)
	leader := c.leader()
	etag := func(n *node, path string) string {
		t.Helper()
		c.converge()
		return n.ask(t, "GET", path, "").header.Get("ETag")
	}
	const entry, space = "/api/v1/config/app/k", "/api/v1/config/app"
	write := func(method, path, body string) {
		t.Helper()
		if a := leader.ask(t, method, path, body); a.status/100 != 2 {
			t.Fatalf("%s %s: %v", method, path, a)
		}
	}
	for _, n := range []*node{leader, c.followers()[0]} {
		write("PUT", entry, `{"value":"first"}`)
		for _, m := range []struct {
			name, path string
			known      bool // the client sends the ETag that it knows
			change     func()
			status     int
			holds      string // what the answer's body holds
		}{
			{"a change", entry, true, func() { write("PUT", entry, `{"value":"second"}`) }, 200, `"second"`},
			{"a change, raw", entry + "?raw", true, func() { write("PUT", entry, `{"value":"third"}`) }, 200, "third"},
			{"a change, consistent", entry + "?consistent", true, func() { write("PUT", entry, `{"value":"fourth"}`) }, 200, `"fourth"`},
			{"a change, stale", entry + "?stale", true, func() { write("PUT", entry, `{"value":"fifth"}`) }, 200, `"fifth"`},
			{"a patch", entry, true, func() { write("PATCH", space, `{"a":"1","k":"patched","z":"1"}`) }, 200, `"patched"`},
			{"others first", entry, true, func() {
				write("PUT", space+"/k2", `{"value":"1"}`)
				write("PUT", "/api/v1/config/app2/k", `{"value":"1"}`)
				write("PUT", "/api/v1/namespaces/app", `{"description":"x"}`)
				write("PUT", entry, `{"value":"patched"}`) // changes nothing
				write("PUT", entry, `{"value":"at last"}`)
			}, 200, `"at last"`},
			{"a delete", entry, true, func() { write("DELETE", entry, "") }, 404, "not-found"},
			{"a creation", entry, false, func() { write("PUT", entry, `{"value":"again"}`) }, 200, `"again"`},
			{"a delete and a creation", entry, true, func() {
				write("PATCH", space, `{"k":null}`)
				write("PUT", entry, `{"value":"anew"}`)
			}, 0, ""}, // either, as it falls
			{"a change in a namespace", space, true, func() { write("PUT", space+"/other", `{"value":"`+n.id+`"}`) }, 200, `"other"`},
			{"a delete in a namespace", space, true, func() { write("DELETE", space+"/other", "") }, 200, `"k"`},
			{"a description", "/api/v1/namespaces/app", true, func() { write("PUT", "/api/v1/namespaces/app", `{"description":"`+n.id+`"}`) }, 200, n.id},
			{"the keys of a namespace", "/api/v1/namespaces/app/keys", true, func() { write("PUT", space+"/third", `{"value":"1"}`) }, 200, `"third"`},
			{"the removal of a key of a namespace", "/api/v1/namespaces/app/keys", true, func() { write("DELETE", space+"/third", "") }, 200, `"k"`},
			{"a namespace that is made", "/api/v1/config/new-" + n.id, false, func() { write("PUT", "/api/v1/config/new-"+n.id+"/k", `{"value":"1"}`) }, 200, `"k"`},
			{"a namespace that is emptied", "/api/v1/config/new-" + n.id, true, func() { write("DELETE", "/api/v1/config/new-"+n.id+"/k", "") }, 200, `"items":[]`},
			{"a namespace that is removed", "/api/v1/namespaces/new-" + n.id, true, func() { write("DELETE", "/api/v1/namespaces/new-"+n.id, "") }, 404, "not-found"},
		} {
			var headers []string
			if m.known {
				headers = []string{"If-None-Match", etag(n, m.path)}
			}
			sep := "?"
			if strings.Contains(m.path, "?") {
				sep = "&"
			}
			p := newPending(t, n)
			if err := p.send("GET", m.path+sep+"wait=1m", "", headers...); err != nil {
				t.Fatal(err)
			}
			held(t, p, 20*time.Millisecond)
			m.change()
			a, err := p.answer()
			if err != nil {
				t.Fatalf("%s at %s: %v", m.name, n.id, err)
			}
			switch {
			case m.status == 0 && (a.status == 200 || a.status == 404):
			case a.status != m.status || !strings.Contains(string(a.body), m.holds):
				t.Errorf("%s at %s: %v, want %d with %s", m.name, n.id, a, m.status, m.holds)
			}
			if a.status == 200 && m.known && a.header.Get("ETag") == headers[1] || a.header.Get("Confman-Staleness-Ms") == "" {
				t.Errorf("%s at %s: %v", m.name, n.id, a.header)
			}
			p.conn.Close()
		}

		// What does not wait: a client that is behind, one that knows nothing of what is there,
		// one that knows something of what is not; and what waits in vain.
		now := etag(n, entry)
		for _, m := range []struct {
			name, path string
			headers    []string
			status     int
			whole      bool // the wait takes all its time
		}{
			{"behind", entry + "?wait=1m", []string{"If-None-Match", `"1"`}, 200, false},
			{"no ETag", entry + "?wait=1m", nil, 200, false},
			{"a namespace, behind", space + "?wait=1m", []string{"If-None-Match", `"1"`}, 200, false},
			{"deleted meanwhile", entry + "gone?wait=1m", []string{"If-None-Match", now}, 404, false},
			{"another ETag among them", entry + "?wait=1m", []string{"If-Match", `"1"`}, 412, false},
			{"in vain", entry + "?wait=200ms", []string{"If-None-Match", now}, 304, true},
			{"in vain, any", entry + "?wait=200ms", []string{"If-None-Match", "*"}, 304, true},
			{"in vain, a namespace", space + "?wait=200ms", []string{"If-None-Match", etag(n, space)}, 304, true},
			{"never made", entry + "gone?wait=200ms", nil, 404, true},
			{"a namespace never made", "/api/v1/config/never?wait=200ms", nil, 404, true},
		} {
			start := time.Now()
			a := n.ask(t, "GET", m.path, "", m.headers...)
			took := time.Since(start)
			if a.status != m.status || m.whole && took < 200*time.Millisecond || took > limit(5*time.Second) {
				t.Errorf("%s at %s: %v after %v, want %d", m.name, n.id, a, took, m.status)
			}
			if a.status == 304 && (a.header.Get("ETag") == "" || len(a.body) > 0) {
				t.Errorf("%s at %s: %v, %v", m.name, n.id, a.header, a)
			}
		}
		for _, v := range []string{"", "x", "5", "-1s", "0s", "5m1s", "1h", "1s1s1"} {
			if a := n.ask(t, "GET", entry+"?wait="+v, "", "If-None-Match", now); a.status != http.StatusBadRequest {
				t.Errorf("wait=%q at %s: %v, want 400", v, n.id, a)
			}
		}
		for _, path := range []string{"/api/v1/namespaces?wait=1s", "/api/v1/audit/app?wait=1s", entry + "?wait=1s&version=1", entry + "?wait=1s&wait=2s"} {
			if a := n.ask(t, "GET", path, ""); a.status != http.StatusBadRequest {
				t.Errorf("GET %s at %s: %v, want 400", path, n.id, a)
			}
		}
	}
}

// held complains if a request is answered within a time.
func held(t *testing.T, p *pending, d time.Duration) {
	t.Helper()
	p.conn.SetReadDeadline(time.Now().Add(d))
	if b, err := p.r.Peek(1); err == nil {
		t.Errorf("answered at once: %q", b)
	}
	p.conn.SetReadDeadline(time.Now().Add(limit(15 * time.Second)))
}

// TestSlowReader: clients that do not read their streams delay no write and cost the node no
// memory for what they have not read, and they miss nothing.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	readers, writes := 24, 16
	if raced {
		readers = 4 // the race detector has memory of its own, so it is not looked at
	}
	c := startCluster(t, 3, calm)
	leader := c.leader()
	leader.put(t, "slow", "k", "first")
	var slow []*stream
	for range readers {
		s, a, err := openStream(leader, "slow", "")
		if err != nil || s == nil {
			t.Fatalf("%v, %v", a, err)
		}
		defer s.close()
		slow = append(slow, s)
	}
	// Each event has the old value and the new: 16 MB for each reader, far more than sockets hold.
	value := strings.Repeat("x", 500<<10)
	before := resident(t, leader)
	var took []time.Duration
	for i := range writes {
		start := time.Now()
		leader.put(t, "slow", "k", fmt.Sprint(i, value))
		took = append(took, time.Since(start))
	}
	grown, unread := resident(t, leader)-before, readers*writes*2*len(value)
	slowest := slices.Max(took)
	t.Logf("the slowest of %d writes took %v; with %d MB unread %s has grown by %d MB", writes, slowest, unread>>20, leader.id, grown>>20)
	// A write that waits for a reader waits for longer: nobody reads before all are made.
	if slowest > limit(5*time.Second) {
		t.Errorf("a write took %v while streams were not read", slowest)
	}
	// The writes themselves and one event for each reader make about a quarter of it.
	if grown > unread/2 && !raced {
		t.Errorf("%s has grown by %d MB, %d MB are unread", leader.id, grown>>20, unread>>20)
	}
	for _, s := range []*stream{slow[0], slow[readers-1]} {
		for i := range writes {
			f, err := s.next()
			if err != nil {
				t.Fatal(err)
			}
			var e eventDoc
			if err := json.Unmarshal([]byte(f.data), &e); err != nil || e.NewValue == nil || *e.NewValue != fmt.Sprint(i, value) {
				t.Fatalf("event %d is %.200s (%v)", i, f.data, err)
			}
		}
	}
}

// newReader makes a server of a store without a cluster, for reads with ?stale.
func newReader(tb testing.TB, w *writer) *server {
	tb.Helper()
	cfg := defaults()
	cfg.Cluster.NodeId = "node1"
	cfg.Auth.ApiKeys = []apiKey{{Key: adminKey, Name: "Operators", Role: "admin"}}
	return newServer(cfg, w.st, &raftNode{id: "node1", cfg: cfg, store: w.st}, slog.New(slog.DiscardHandler))
}

// TestOthersDoNotWake: ten thousand writes to other keys do not wake who waits for one, and
// the write to that key does.
func TestOthersDoNotWake(t *testing.T) {
	t.Parallel()
	const writes, batch = 10_000, 100
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"), set("other", "k", "v"))
	s := newReader(t, w)
	for _, m := range []struct {
		name    string
		subject func(*call) string
		key     string
		wakes   *command
	}{
		{"an entry", entrySubject, "k", set("app", "k", "w")},
		{"an entry that is not there", entrySubject, "missing", set("app", "missing", "w")},
		{"an entry, deleted", entrySubject, "k", unset("app", "k")},
		{"a namespace", namespaceSubject, "", set("app", "new", "w")},
	} {
		looks := make(chan struct{}, writes)
		rec := httptest.NewRecorder()
		r := httptest.NewRequest("GET", "/?wait=1m", nil)
		c := &call{s: s, w: &response{ResponseWriter: rec}, r: r, q: r.URL.Query(), ns: "app", key: m.key}
		ended := make(chan error)
		go func() {
			ended <- s.waits(m.subject, func(c *call) error {
				if looks <- struct{}{}; len(looks) > 1 {
					return nil
				}
				return errUnchanged
			})(c)
		}()
		until(t, 10*time.Second, func() error {
			if len(looks) != 1 {
				return fmt.Errorf("it has looked %d times", len(looks))
			}
			return nil
		})
		for i := 0; i < writes; i += batch {
			var cmds []*command
			for k := range batch {
				ns := "app"
				if m.key == "" {
					ns = "other" // any key of the namespace would wake it
				}
				cmds = append(cmds, set(ns, fmt.Sprintf("k/%d", k), m.name+fmt.Sprint(i)))
			}
			w.apply(cmds...)
		}
		if len(looks) != 1 {
			t.Errorf("%s: woken %d times by %d writes to others", m.name, len(looks)-1, writes)
		}
		w.apply(m.wakes)
		if err := <-ended; err != nil || len(looks) != 2 {
			t.Errorf("%s: its own change made it look %d times more, %v; want once", m.name, len(looks)-1, err)
		}
	}
	if n := len(s.watches.bells); n > 0 {
		t.Errorf("%d subjects are watched when nobody waits", n)
	}
}

// TestChangeDuringLook: a change that comes when a wait has looked and found nothing new is not
// missed. It is the look itself that makes it, so no other moment is left to notice it.
func TestChangeDuringLook(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWriter(t, dir)
		w.apply(set("app", "k", "v"))
		s := newReader(t, w)
		r := httptest.NewRequest("GET", "/?wait=1m", nil)
		c := &call{s: s, w: &response{ResponseWriter: httptest.NewRecorder()}, r: r, q: r.URL.Query(), ns: "app", key: "k"}
		start, looks := time.Now(), 0
		err := s.waits(entrySubject, func(*call) error {
			if looks++; looks > 1 {
				return nil
			}
			w.apply(set("app", "k", "w"))
			return errUnchanged
		})(c)
		// In here time passes only where everyone waits for it.
		if took := time.Since(start); err != nil || looks != 2 || took > 0 {
			t.Errorf("%d looks in %v, %v; want a second one at once", looks, took, err)
		}
	})
}

// TestWaitForTakesBellFirst: a revision that is reached between waitFor's look and its wait is not
// missed. While the test holds the bell, waitFor stands before the place where it takes it: if it
// has looked by then, it has seen the old revision.
func TestWaitForTakesBellFirst(t *testing.T) {
	t.Parallel()
	s := &store{}
	s.pos.Store(&position{rev: 1})
	s.changed.mu.Lock()
	ctx, cancel := context.WithTimeout(t.Context(), limit(10*time.Second))
	defer cancel()
	came := make(chan bool)
	go func() { came <- s.waitFor(ctx, 2) }()
	until(t, 10*time.Second, func() error {
		var all strings.Builder
		pprof.Lookup("goroutine").WriteTo(&all, 2) // a Builder takes everything
		for _, g := range strings.Split(all.String(), "\n\n") {
			if strings.Contains(g, t.Name()) && strings.Contains(g, ".waitFor(") && strings.Contains(g, "sync.(*Mutex).Lock") {
				return nil
			}
		}
		return errors.New("waitFor does not stand before the bell")
	})
	s.pos.Store(&position{rev: 2}) // and the ring: nobody has the bell yet
	s.changed.mu.Unlock()
	if !<-came {
		t.Error("revision 2 was there when waitFor began to wait, and it waited on")
	}
}

// TestAbandonedWaits: clients that went away while they waited leave no goroutine, no
// doorbell and no memory behind. It does not run beside other tests: it counts what this
// process has.
func TestAbandonedWaits(t *testing.T) {
	waits, batch := rounds(2000, 10_000), 1000 // a batch at a time: both ends of a connection are files of this process
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"))
	s := newReader(t, w)
	ts := httptest.NewServer(s)
	defer ts.Close()
	bells := func() (n int) {
		s.watches.mu.Lock()
		defer s.watches.mu.Unlock()
		for _, b := range s.watches.bells {
			n += len(b)
		}
		return n
	}
	paths := []string{"/api/v1/config/app/k?stale&wait=5m", "/api/v1/config/app?stale&wait=5m", "/api/v1/config/app/missing?stale&wait=5m", "/api/v1/audit/app?stale"}
	abandon := func(n int) {
		var conns []net.Conn
		for i := range n {
			conn, err := net.Dial("tcp", ts.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conns = append(conns, conn)
			tag := "If-None-Match: \"1\"\r\n"
			if i%4 == 2 {
				tag = "" // it waits for what is missing
			}
			fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: test\r\nX-API-Key: %s\r\nAccept: text/event-stream\r\n%s\r\n", paths[i%4], adminKey, tag)
		}
		until(t, limit(20*time.Second), func() error {
			if got := bells(); got != n {
				return fmt.Errorf("%d of %d wait", got, n)
			}
			return nil
		})
		for _, conn := range conns {
			conn.Close()
		}
		until(t, limit(20*time.Second), func() error {
			if got := bells(); got > 0 {
				return fmt.Errorf("%d wait for clients that are gone", got)
			}
			return nil
		})
	}
	abandon(batch) // pools and stacks that are kept are made here
	goroutines := runtime.NumGoroutine()
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC() // pools are emptied in two steps
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for range waits / batch {
		abandon(batch)
	}
	until(t, limit(10*time.Second), func() error {
		if got := runtime.NumGoroutine(); got > goroutines+3 {
			return fmt.Errorf("%d goroutines, %d before %d waits were abandoned", got, goroutines, waits)
		}
		return nil
	})
	after := heap()
	t.Logf("%d waits abandoned: %d goroutines before, %d after; %d KB before, %d KB after",
		waits, goroutines, runtime.NumGoroutine(), before>>10, after>>10)
	if after > before+uint64(waits)*100 { // a leak has more than 100 bytes
		t.Errorf("%d KB are in use, %d KB before", after>>10, before>>10)
	}
	if len(s.watches.bells) > 0 {
		t.Errorf("%d subjects are watched when nobody waits", len(s.watches.bells))
	}
}

// A collector is a ResponseWriter whose body can be looked at while it is written.
type collector struct {
	header http.Header
	mu     sync.Mutex // protects buf
	buf    bytes.Buffer
}

func (c *collector) Header() http.Header { return c.header }
func (c *collector) WriteHeader(int)     {}
func (c *collector) Flush()              {}
func (c *collector) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.Write(b)
}

func (c *collector) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.String()
}

// TestKeepAlive: a stream that has nothing to say says so every 15 seconds.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWriter(t, dir)
		w.apply(set("app", "k", "v"))
		s := newReader(t, w)
		ctx, cancel := context.WithCancel(t.Context())
		r := httptest.NewRequestWithContext(ctx, "GET", "/api/v1/audit/app?stale", nil)
		r.Header.Set("X-API-Key", adminKey)
		r.Header.Set("Accept", "text/event-stream")
		out := &collector{header: http.Header{}}
		ended := make(chan struct{})
		go func() {
			s.ServeHTTP(out, r)
			close(ended)
		}()
		synctest.Wait()
		start := out.String()
		if !strings.HasPrefix(start, ":") || strings.Contains(start, "id:") {
			t.Errorf("a stream begins with %q", start)
		}
		for range 4 {
			time.Sleep(15 * time.Second)
			synctest.Wait()
		}
		comments := strings.TrimPrefix(out.String(), start)
		if lines := strings.Split(comments, "\n\n"); len(lines) != 5 || strings.Trim(comments, ": \n") != "" {
			t.Errorf("in a minute a stream without events says %q, want a comment every 15s", comments)
		}
		cancel()
		<-ended
	})
}

// TestEndedWaits: a wait that ends because its node stops is answered as one whose time is over,
// and tells the client to call elsewhere next time.
func TestEndedWaits(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"))
	for _, m := range []struct {
		path, etag string
		status     int
	}{
		{keyPath("app", "k"), `"1"`, http.StatusNotModified},
		{keyPath("app", "missing"), "", http.StatusNotFound},
		{"/api/v1/config/app", `"1"`, http.StatusNotModified},
		{"/api/v1/namespaces/app/keys", `"1"`, http.StatusNotModified},
	} {
		s := newReader(t, w)
		r := httptest.NewRequest("GET", m.path+"?stale&wait=30s", nil)
		r.Header.Set("X-API-Key", adminKey)
		if m.etag != "" {
			r.Header.Set("If-None-Match", m.etag)
		}
		rec := httptest.NewRecorder()
		answered := make(chan struct{})
		go func() {
			s.ServeHTTP(rec, r)
			close(answered)
		}()
		until(t, limit(5*time.Second), func() error {
			s.watches.mu.Lock()
			defer s.watches.mu.Unlock()
			if len(s.watches.bells) == 0 {
				return fmt.Errorf("GET %s does not wait", m.path)
			}
			return nil
		})
		close(s.ending)
		<-answered
		if rec.Code != m.status || rec.Header().Get("Connection") != "close" {
			t.Errorf("GET %s at the end of its node: %d, Connection %q, want %d and close", m.path, rec.Code, rec.Header().Get("Connection"), m.status)
		}
	}
}

// A streamDeadline is a ResponseWriter that notes for how long each write of a stream may take.
type streamDeadline struct {
	*httptest.ResponseRecorder
	until time.Time
	times []time.Duration // one for each write; what was written without a deadline has less than none
}

func (d *streamDeadline) SetWriteDeadline(t time.Time) error {
	d.until = t
	return nil
}

func (d *streamDeadline) Write(b []byte) (int, error) {
	d.times = append(d.times, time.Until(d.until))
	return d.ResponseRecorder.Write(b)
}

// TestStreamWriteDeadline: each write of a stream has 30 s of its own, so that a client that
// takes nothing any more is cut, and one that goes on listening is not.
func TestStreamWriteDeadline(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWriter(t, dir)
		w.apply(set("app", "k", "v"))
		s := newReader(t, w)
		r := httptest.NewRequest("GET", "/api/v1/audit/app?stale", nil)
		r.Header.Set("X-API-Key", adminKey)
		r.Header.Set("Accept", "text/event-stream")
		out := &streamDeadline{ResponseRecorder: httptest.NewRecorder()}
		ended := make(chan struct{})
		go func() {
			s.ServeHTTP(out, r)
			close(ended)
		}()
		synctest.Wait() // it has said that it begins
		time.Sleep(14 * time.Second)
		w.apply(set("app", "k", "w"))
		time.Sleep(50 * time.Second) // comments, until the deadline of the beginning is over
		w.apply(set("app", "k", "x"))
		synctest.Wait()
		close(s.ending)
		<-ended
		want := slices.Repeat([]time.Duration{30 * time.Second}, 1+1+4+1)
		if diff := gocmp.Diff(want, out.times); diff != "" {
			t.Errorf("how long each write may take (-want +is):\n%s", diff)
		}
	})
}

// TestStreamOverSnapshot: a stream goes on without gap or repeat when the state under it is
// replaced by a snapshot, and one that resumes behind it too.
func TestStreamOverSnapshot(t *testing.T) {
	t.Parallel()
	leader, follower := newWriter(t, t.TempDir()), newWriter(t, t.TempDir())
	var want, wantApp []string
	write := func(rev int, to ...*writer) {
		ns, id := "other", fmt.Sprintf("%d-0", rev)
		if want = append(want, id); rev%2 == 0 {
			ns, wantApp = "app", append(wantApp, id)
		}
		for _, w := range to {
			w.apply(set(ns, fmt.Sprint("k", rev%5), fmt.Sprint(rev)))
		}
	}
	for rev := range 50 {
		write(rev+1, leader, follower)
	}
	s := newReader(t, follower)
	ts := httptest.NewServer(s)
	defer ts.Close()
	defer close(s.ending) // before ts.Close, which waits for streams
	n := &node{tb: t, id: "follower", url: ts.URL}
	open := func(ns, query string, headers ...string) *stream {
		t.Helper()
		st, a, err := openStream(n, ns, query+"&stale", headers...)
		if err != nil || st == nil {
			t.Fatalf("%v, %v", a, err)
		}
		return st
	}
	read := func(st *stream, n int) (ids []string) {
		t.Helper()
		timer := time.AfterFunc(limit(10*time.Second), st.close)
		defer timer.Stop()
		for range n {
			f, err := st.next()
			if err != nil {
				t.Fatalf("behind %q: %v", ids, err)
			}
			ids = append(ids, f.id)
		}
		return ids
	}
	all, app := open("", "?since=0"), open("app", "?since=0")
	defer all.close()
	defer app.close()
	gotAll, gotApp := read(all, 50), read(app, 25)
	for rev := range 150 { // these it does not hear of
		write(rev+51, leader)
	}
	if err := follower.st.replace(io.NopCloser(snapshotOf(t, leader.st))); err != nil {
		t.Fatal(err)
	}
	gotAll, gotApp = append(gotAll, read(all, 150)...), append(gotApp, read(app, 75)...)
	if diff := gocmp.Diff(want, gotAll); diff != "" {
		t.Errorf("all (-trail +stream):\n%s", diff)
	}
	if diff := gocmp.Diff(wantApp, gotApp); diff != "" {
		t.Errorf("one namespace (-trail +stream):\n%s", diff)
	}
	resumed := open("", "?since=0", "Last-Event-ID", "30-0")
	defer resumed.close()
	if diff := gocmp.Diff(want[30:], read(resumed, 170)); diff != "" {
		t.Errorf("behind 30-0 (-trail +stream):\n%s", diff)
	}
}

// TestWaitDoesNotGoBack: a client that has seen a change at one node and goes on waiting at another
// that has not is not shown what was before.
func TestWaitDoesNotGoBack(t *testing.T) {
	t.Parallel()
	c, roads := newLinked(t, 3, "", nil, calm)
	c.start()
	leader, f := c.leader(), c.followers()[0]
	leader.put(t, "app", "k", "old")
	c.converge()
	for _, path := range []string{keyPath("app", "k"), "/api/v1/config/app", "/api/v1/namespaces/app"} {
		// The follower can ask the leader, but gets no entries.
		roads.of(leader, f).hold(calls, true)
		newer := leader.put(t, "app", "k", "new "+path).Revision
		p := newPending(t, f)
		if err := p.send("GET", path+"?wait=15s&stale", "", "If-None-Match", fmt.Sprintf(`"%d"`, newer)); err != nil {
			t.Fatal(err)
		}
		held(t, p, 100*time.Millisecond)
		roads.of(leader, f).hold(calls, false)
		until(t, 15*time.Second, func() error {
			if rev, err := revision(f); err != nil || rev < newer {
				return fmt.Errorf("revision %d of %d, %v", rev, newer, err)
			}
			return nil
		})
		last := leader.put(t, "app", "k", "newer "+path).Revision
		if a, err := p.answer(); err != nil || a.status != http.StatusOK || a.header.Get("ETag") != fmt.Sprintf(`"%d"`, last) {
			t.Errorf("GET %s, from one who knew revision %d: %v, ETag %s, %v, want that of %d", path, newer, a, a.header.Get("ETag"), err, last)
		}
		c.converge()
		// A tag that no node has made is no reason to wait.
		for _, n := range c.nodes {
			if a := n.ask(t, "GET", path+"?wait=5m", "", "If-None-Match", fmt.Sprintf(`"%d"`, last+1000)); a.status != http.StatusOK {
				t.Errorf("GET %s at %s, with a tag beyond: %v", path, n.id, a)
			}
		}
	}
}
