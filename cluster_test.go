package main

// Scenarios on real clusters: form, elect, kill, pause, restart, catch up, stop,
// refuse to start. CONFMAN_LONG=1 makes the rounds as many as the issue asks for.

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// rounds returns how often a test repeats what it does: long with CONFMAN_LONG,
// else short.
func rounds(short, long int) int {
	if os.Getenv("CONFMAN_LONG") != "" {
		return long
	}
	return short
}

// steady keeps elections away from tests that are not about them, whatever else
// this machine does.
var steady = with("Cluster", "LowerElectionTimeout", 1000)

// A workload is a set of clients that write without pause and remember what
// became of every write. Each write has a correlation id of its own, which is
// also its value; each client writes the same few keys again and again, so that
// a write that is applied twice shows as an event too many.
type workload struct {
	c    *cluster
	quit chan struct{}
	wg   sync.WaitGroup

	key     string       // what the clients send
	attempt sync.RWMutex // held for reading while an attempt is made; guards key

	mu      sync.Mutex        // protects the rest
	acked   map[string]uint64 // correlation id to revision
	unknown map[string]doubt  // by correlation id
	wrong   []string          // answers that the contract does not know
}

// A doubt is how a client came not to know what became of its write.
type doubt struct {
	saw      string
	from, to time.Time // of the request
	cut      bool      // there was no answer: the connection ended
}

// startLoad sets clients to work on c until end or check.
func startLoad(c *cluster, clients int) *workload {
	l := &workload{c: c, quit: make(chan struct{}), key: adminKey, acked: make(map[string]uint64), unknown: make(map[string]doubt)}
	c.tb.Cleanup(l.end) // before the nodes go, if the test has not done it
	for client := range clients {
		l.wg.Go(func() {
			for i := 0; l.write(fmt.Sprintf("w%d-%06d", client, i), fmt.Sprintf("w%d/k%d", client, i%5)); i++ {
			}
		})
	}
	return l
}

// write makes one write, as often as it takes: a refusal says that it was not
// applied, so it is repeated, at the node that leads now. write returns false
// when the workload ends.
func (l *workload) write(id, key string) bool {
	base := l.any()
	for {
		select {
		case <-l.quit:
			return false
		default:
		}
		from := time.Now()
		l.attempt.RLock()
		a, err := do("PUT", base+keyPath("load", key), l.key, `{"value":"`+id+`"}`, "X-Correlation-Id", id)
		l.attempt.RUnlock()
		l.mu.Lock()
		again := l.note(id, from, a, err)
		l.mu.Unlock()
		if !again {
			return true
		}
		if err == nil && a.status == http.StatusTemporaryRedirect {
			if to, ok := strings.CutSuffix(a.header.Get("Location"), keyPath("load", key)); ok && to != base {
				base = to
				continue
			}
		}
		base = l.any()
		select {
		case <-l.quit:
		case <-time.After(10 * time.Millisecond): // the pace of the question
		}
	}
}

// any is the URL of one of the nodes. A test that changes which there are holds l.mu.
func (l *workload) any() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.c.nodes[rand.IntN(len(l.c.nodes))].url
}

// useKey gives the clients another key. None of them sends the old one when it returns.
func (l *workload) useKey(key string) {
	l.attempt.Lock()
	defer l.attempt.Unlock()
	l.key = key
}

// note takes down what became of an attempt and says whether to try again. l.mu
// is held.
func (l *workload) note(id string, from time.Time, a *answer, err error) (again bool) {
	var p struct {
		Revision uint64
		Outcome  string
	}
	if err == nil && len(a.body) > 0 {
		json.Unmarshal(a.body, &p) // an answer that is not JSON has no outcome and is noted as wrong
	}
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return true
	case err != nil:
		l.unknown[id] = doubt{err.Error(), from, time.Now(), true}
	case a.status/100 == 2 && p.Revision > 0:
		l.acked[id] = p.Revision
	case a.status == http.StatusTemporaryRedirect && a.slug() == "not-leader":
		return true
	case a.status == http.StatusServiceUnavailable && p.Outcome == "not-applied":
		return true
	case a.status == http.StatusGatewayTimeout && p.Outcome == "unknown":
		l.unknown[id] = doubt{a.String(), from, time.Now(), false}
	default:
		l.wrong = append(l.wrong, fmt.Sprintf("%s: %v", id, a))
	}
	return false
}

// count returns how many writes are acknowledged.
func (l *workload) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.acked)
}

// more waits until n more writes are acknowledged, for at most d.
func (l *workload) more(d time.Duration, n int) {
	l.c.tb.Helper()
	want := l.count() + n
	until(l.c.tb, d, func() error {
		if got := l.count(); got < want {
			return fmt.Errorf("%d writes are acknowledged, want %d", got, want)
		}
		return nil
	})
}

// end waits until all clients have stopped.
func (l *workload) end() {
	select {
	case <-l.quit:
	default:
		close(l.quit)
	}
	l.wg.Wait()
}

// check ends the workload and compares what the clients saw with the trail: an
// acknowledged write is in it once, with the revision that the client was told;
// one of unknown outcome at most once; one that was only ever refused, never.
// Every key has the value of its newest event.
func (l *workload) check() {
	tb := l.c.tb
	tb.Helper()
	l.end()
	l.c.ready()
	// What no client waits for any more may still be in a log: a new leader commits it.
	until(tb, 15*time.Second, func() error {
		a, err := do("GET", l.c.leader().url+"/api/v1/audit/load?consistent&limit=1", adminKey, "")
		if err == nil && a.status != http.StatusOK {
			err = fmt.Errorf("read behind the log: %v", a)
		}
		return err
	})
	l.c.converge()
	tb.Logf("%d writes acknowledged, %d of unknown outcome", len(l.acked), len(l.unknown))
	for _, w := range l.wrong {
		tb.Errorf("unexpected answer to %s", w)
	}
	n := l.c.leader()
	seen, values := make(map[string]int), make(map[string]string)
	for _, e := range n.trail(tb, "load") {
		id := e.CorrelationID
		seen[id]++
		rev, acked := l.acked[id]
		_, unknown := l.unknown[id]
		switch {
		case !acked && !unknown:
			tb.Errorf("%s was refused each time and is in the trail: %s", id, e.raw)
		case acked && rev != e.Revision:
			tb.Errorf("%s was acknowledged as revision %d: %s", id, rev, e.raw)
		case seen[id] > 1:
			tb.Errorf("%s is in the trail %d times: %s", id, seen[id], e.raw)
		}
		if e.NewValue == nil || *e.NewValue != id {
			tb.Errorf("%s has another value: %s", id, e.raw)
			continue
		}
		values[e.Key] = id
	}
	lost := 0
	for id, rev := range l.acked {
		if seen[id] == 0 {
			if lost++; lost <= 10 {
				tb.Errorf("%s was acknowledged as revision %d and is not in the trail", id, rev)
			}
		}
	}
	if lost > 0 {
		tb.Errorf("%d acknowledged writes are lost", lost)
	}
	got := make(map[string]string)
	for _, raw := range n.items(tb, "/api/v1/config/load", url.Values{"stale": {""}}) {
		var e entryDoc
		if err := json.Unmarshal(raw, &e); err != nil {
			tb.Fatal(err)
		}
		got[e.Key] = e.Value
	}
	if diff := cmp.Diff(values, got); diff != "" {
		tb.Errorf("newest events and entries differ (-trail +entries):\n%s", diff)
	}
}

// TestFormation: three nodes from one file form one cluster in under five
// seconds, and in any order of starting.
func TestFormation(t *testing.T) {
	t.Parallel()
	t.Run("at once", func(t *testing.T) {
		c := newCluster(t, 3)
		start := time.Now()
		c.start()
		if took := time.Since(start); took >= limit(5*time.Second) {
			t.Errorf("ready after %v, ordered is under 5s", took)
		} else {
			t.Logf("ready after %v", took)
		}
		writeEverywhere(t, c)
	})
	t.Run("one after another", func(t *testing.T) {
		c := newCluster(t, 3)
		first, second, third := c.nodes[2], c.nodes[0], c.nodes[1]
		first.start()
		until(t, 5*time.Second, func() error {
			code, st, err := first.status()
			if err == nil && (code != http.StatusServiceUnavailable || st.Status != "not-ready" || st.Reason == "") {
				err = fmt.Errorf("one of three says %d %+v", code, st)
			}
			return err
		})
		if a, err := do("GET", first.url+"/health", "", ""); err != nil || a.status != http.StatusOK || strings.TrimSpace(string(a.body)) != `{"status":"healthy"}` {
			t.Errorf("/health of one of three: %v, %v", a, err)
		}
		second.start()
		c.ready()
		second.put(t, "early", "k", "before the third")
		third.start()
		c.ready()
		c.converge()
		if got := third.get(t, "early", "k").Value; got != "before the third" {
			t.Errorf("the third shows %q", got)
		}
		writeEverywhere(t, c)
	})
}

// writeEverywhere writes and deletes through each node and expects the same entry,
// trail and hash at all.
func writeEverywhere(t *testing.T, c *cluster) {
	t.Helper()
	want := make(map[string]entryDoc)
	for _, n := range c.nodes {
		n.put(t, "everywhere", n.id, "for a moment")
		n.delete(t, "everywhere", n.id)
		want[n.id] = n.put(t, "everywhere", n.id, "through "+n.id)
	}
	c.converge()
	trail := c.nodes[0].trail(t, "everywhere")
	for _, n := range c.nodes {
		got := make(map[string]entryDoc)
		for id := range want {
			got[id] = n.get(t, "everywhere", id)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("entries at %s (-put +get):\n%s", n.id, diff)
		}
		if diff := cmp.Diff(trail, n.trail(t, "everywhere"), cmp.AllowUnexported(eventDoc{})); diff != "" {
			t.Errorf("trails of %s and %s:\n%s", c.nodes[0].id, n.id, diff)
		}
	}
}

// TestElection kills the leader under load, again and again.
func TestElection(t *testing.T) {
	c := startCluster(t, 3)
	load := startLoad(c, 32)
	load.more(limit(10*time.Second), 200)
	for round := range rounds(5, 20) {
		old := c.leader()
		start := time.Now()
		old.kill()
		until(t, limit(5*time.Second), func() error {
			for _, n := range c.live() {
				if code, st, err := n.status(); err == nil && code == http.StatusOK && st.Role == "leader" {
					return nil
				}
			}
			return fmt.Errorf("round %d: nobody leads after %s", round, old.id)
		})
		t.Logf("round %d: another leads after %v", round, time.Since(start).Round(time.Millisecond))
		load.more(limit(5*time.Second), 200)
		old.start()
		c.ready()
	}
	load.check()
}

// TestAllKilled cuts the power of all three under load.
func TestAllKilled(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	load := startLoad(c, 16)
	for range rounds(3, 10) {
		load.more(limit(10*time.Second), 300)
		start := time.Now()
		for _, n := range c.nodes {
			n.signal(syscall.SIGKILL)
		}
		if took := time.Since(start); took > 50*time.Millisecond {
			t.Logf("the kill took %v", took)
		}
		for _, n := range c.nodes {
			n.kill() // waits for its end
		}
		c.start()
	}
	load.more(limit(10*time.Second), 100)
	load.check()
}

// TestPaused stops processes under load without closing their connections, as a
// stalled machine does: the leader, which is replaced and finds out when it goes
// on; then both followers, so that the leader steps down with writes in flight
// that are made after all when they go on.
func TestPaused(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	load := startLoad(c, 16)
	for range rounds(2, 10) {
		load.more(limit(10*time.Second), 100)
		old := c.leader()
		before := old.put(t, "pause", "k", "before")
		old.pause()
		c.leader() // among the others
		after := c.live()[0].put(t, "pause", "k", "after")
		if after.Version != before.Version+1 {
			t.Errorf("version %d follows %d", after.Version, before.Version)
		}
		old.resume()
		c.ready()
		until(t, limit(5*time.Second), func() error {
			if got := old.get(t, "pause", "k"); got != after {
				return fmt.Errorf("after its pause %s shows %+v, want %+v", old.id, got, after)
			}
			return nil
		})

		load.more(limit(10*time.Second), 100)
		alone, others := c.leader(), c.followers()
		for _, n := range others {
			n.pause()
		}
		until(t, limit(5*time.Second), func() error {
			code, st, err := alone.status()
			if err == nil && (code == http.StatusOK || st.Role == "leader") {
				err = fmt.Errorf("without followers %s says %d %+v", alone.id, code, st)
			}
			return err
		})
		for _, n := range others {
			n.resume()
		}
		c.ready()
	}
	load.check()
}

// TestCatchUp: a follower that missed 20,000 writes is ready in under 15s, by a
// snapshot.
func TestCatchUp(t *testing.T) {
	t.Parallel()
	missed := 20_000
	if raced {
		missed = 12_000 // still more than the log keeps
	}
	c := startCluster(t, 3, steady)
	f := c.followers()[0]
	f.put(t, "bench", "before", "x")
	c.converge()
	f.kill()
	leader := c.leader()
	newFleet(t, leader.api, 64).drive(t, missed, func() func(int) []byte {
		r := newPut()
		return func(op int) []byte { return r.with(op%5000, op) }
	})
	if had := snapshots(t, f); len(had) > 0 {
		t.Fatalf("%s has snapshots before it starts: %q", f.id, had)
	}
	until(t, 30*time.Second, func() error {
		if len(snapshots(t, leader)) == 0 {
			return fmt.Errorf("%s makes no snapshot after %d writes", leader.id, missed)
		}
		return nil
	})
	start := time.Now()
	f.start()
	until(t, limit(15*time.Second), func() error {
		want, err := revision(leader)
		if err != nil {
			return err
		}
		if got, err := revision(f); err != nil || got < want {
			return fmt.Errorf("revision %d of %d, %v", got, want, err)
		}
		return f.ready()
	})
	t.Logf("caught up after %v", time.Since(start))
	if len(snapshots(t, f)) == 0 {
		t.Errorf("%s caught up without a snapshot", f.id)
	}
	last := fmt.Sprintf("k%0*d", numberWidth, (missed-1)%5000)
	if got, want := f.get(t, "bench", last), leader.get(t, "bench", last); got != want {
		t.Errorf("%s shows %+v, %s %+v", f.id, got, leader.id, want)
	}
}

// revision returns the revision that n shows.
func revision(n *node) (uint64, error) {
	_, st, err := n.status()
	return st.Revision, err
}

// snapshots returns the names of the whole snapshots in n's data directory.
func snapshots(t *testing.T, n *node) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(n.data, "snapshots", "*"))
	if err != nil {
		t.Fatal(err)
	}
	var whole []string
	for _, name := range all {
		if !strings.HasSuffix(name, ".tmp") {
			whole = append(whole, name)
		}
	}
	return whole
}

// TestCleanStop: SIGTERM under load hands leadership over in under a second, and
// no open write is cut or left in doubt.
func TestCleanStop(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	load := startLoad(c, 8)
	type stop struct{ told, handed, ended time.Time }
	var stops []stop
	told := 0
	// More rounds where this machine was too slow to ask the old leader in its last half second.
	for round := 0; round < rounds(2, 10) || told == 0 && round < 10; round++ {
		load.more(limit(10*time.Second), 100)
		old := c.leader()
		start := time.Now()
		old.signal(syscall.SIGTERM)
		until(t, limit(time.Second), func() error {
			for _, n := range c.nodes {
				if code, st, err := n.status(); err == nil && n != old && code == http.StatusOK && st.Role == "leader" {
					return nil
				}
			}
			return fmt.Errorf("nobody leads after %s", old.id)
		})
		handed := time.Now()
		t.Logf("another leads after %v", handed.Sub(start).Round(time.Millisecond))
		// For half a second it still tells whom to ask, unless this machine was slower than that.
		until(t, limit(time.Second), func() error {
			a, err := do("PUT", old.url+keyPath("other", "late"), adminKey, `{"value":"x"}`)
			switch {
			case err != nil:
				return nil
			case a.status == http.StatusServiceUnavailable: // it does not know yet
				return fmt.Errorf("write after the hand-over: %v", a)
			case a.status != http.StatusTemporaryRedirect || a.header.Get("Connection") != "close":
				t.Errorf("write after the hand-over: %v %v, want 307 and Connection: close", a, a.header)
			}
			told++
			return nil
		})
		if code, st, err := old.status(); err == nil && (code != http.StatusServiceUnavailable || st.Reason == "") {
			t.Errorf("/health/ready after the hand-over: %d %+v, want 503 and a reason", code, st)
		}
		old.ended()
		stops = append(stops, stop{start, handed, time.Now()})
		load.more(limit(5*time.Second), 100)
		old.start()
		c.ready()
	}
	load.check()
	if told == 0 {
		t.Error("no write after the hand-over was answered")
	}
	for id, d := range load.unknown {
		for _, s := range stops {
			switch {
			case d.to.Before(s.told) || d.from.After(s.ended): // an election of its own, on a busy machine
			case d.cut && d.from.After(s.handed): // it met the end of an idle connection, which no server can help
			default:
				t.Errorf("a clean stop left %s in doubt: %s", id, d.saw)
			}
		}
	}
}

// TestDraining: from SIGTERM on a node takes no new write and says that it was not applied, while
// it waits for the writes that are open.
func TestDraining(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	n := c.nodes[0]
	open := newPending(t, n)
	open.conn.SetDeadline(time.Now().Add(limit(15 * time.Second)))
	const body = `{"value":"open"}`
	fmt.Fprintf(open.conn, "PUT %s HTTP/1.1\r\nHost: test\r\nX-API-Key: %s\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n",
		keyPath("app", "k"), adminKey, len(body))
	if line, err := open.r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 100 ") {
		t.Fatalf("a write whose body is waited for: %q, %v", line, err)
	}
	open.r.ReadString('\n') // the empty line behind it

	n.signal(syscall.SIGTERM)
	until(t, limit(5*time.Second), func() error {
		code, st, err := n.status()
		if err == nil && (code != http.StatusServiceUnavailable || st.Reason != "shutting down") {
			err = fmt.Errorf("/health/ready of a node that shuts down: %d %+v", code, st)
		}
		return err
	})
	for _, m := range []struct{ method, path, body string }{
		{"PUT", keyPath("app", "new"), `{"value":"late"}`},
		{"DELETE", keyPath("app", "new"), ""},
		{"PATCH", "/api/v1/config/app", `{"new":"late"}`},
		{"PUT", "/api/v1/namespaces/app", `{}`},
	} {
		a := n.ask(t, m.method, m.path, m.body)
		var doc struct{ Outcome string }
		if err := json.Unmarshal(a.body, &doc); err != nil || a.status != http.StatusServiceUnavailable || a.slug() != "unavailable" ||
			doc.Outcome != "not-applied" || a.header.Get("Retry-After") == "" {
			t.Errorf("%s %s: %v %v, want 503 unavailable, not-applied, Retry-After", m.method, m.path, a, a.header)
		}
	}
	io.WriteString(open.conn, body)
	if a, err := open.answer(); err != nil || a.status != http.StatusCreated {
		t.Errorf("a write that was open: %v, %v, want 201", a, err)
	}
	n.ended()
	n.start()
	c.ready()
	if got := n.get(t, "app", "k").Value; got != "open" {
		t.Errorf("after the restart k is %q", got)
	}
}

// TestNoQuorum: with two of three dead nothing is acknowledged, and every client
// is told so at once.
func TestNoQuorum(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, with("Cluster", "RequestTimeout", 2000), with("Cluster", "MaxStaleness", 1000))
	was := c.leader().put(t, "app", "k", "with a quorum")
	c.converge()
	alone := c.leader()
	for _, n := range c.followers() {
		n.kill()
	}
	put := func(i int) (*answer, time.Duration) {
		t.Helper()
		start := time.Now()
		a, err := do("PUT", alone.url+keyPath("app", "other"), adminKey, fmt.Sprintf(`{"value":"%d"}`, i))
		if err != nil {
			t.Fatal(err)
		}
		if a.status != http.StatusServiceUnavailable && a.status != http.StatusGatewayTimeout {
			t.Errorf("write without a quorum: %v", a)
		}
		return a, time.Since(start)
	}
	for i := range 3 { // it still believes that it leads
		if a, took := put(i); took > 4*time.Second {
			t.Errorf("write without a quorum: %v after %v", a, took)
		}
	}
	until(t, 5*time.Second, func() error {
		if a, took := put(3); a.slug() != "no-leader" || took > 500*time.Millisecond || a.header.Get("Retry-After") == "" {
			return fmt.Errorf("write without a leader: %v %v after %v", a, a.header, took)
		}
		return nil
	})
	until(t, 5*time.Second, func() error {
		a, err := do("GET", alone.url+keyPath("app", "k"), readerKey, "")
		if err == nil && (a.status != http.StatusServiceUnavailable || a.slug() != "stale-read") {
			err = fmt.Errorf("read without a quorum: %v", a)
		}
		return err
	})
	if got := alone.get(t, "app", "k"); got != was {
		t.Errorf("?stale without a quorum: %+v, want %+v", got, was)
	}
	if code, st, err := alone.status(); err != nil || code != http.StatusServiceUnavailable || st.Reason == "" {
		t.Errorf("/health/ready without a quorum: %d %+v %v", code, st, err)
	}
	for _, n := range c.nodes {
		if n != alone {
			n.start()
		}
	}
	c.ready()
	alone.put(t, "app", "k", "with a quorum again")
}

// TestRedirect: a follower sends a write on to the leader's configured address,
// whatever the request says, and after all that it can refuse itself.
func TestRedirect(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, steady)
	leader, f := c.leader(), c.followers()[0]
	if _, st, err := f.status(); err != nil || st.Leader != leader.url {
		t.Errorf("/health/ready names the leader %q, want %q (%v)", st.Leader, leader.url, err)
	}
	for _, m := range []struct {
		method, path, key string
		status            int
		slug              string
	}{
		{"PUT", "/api/v1/config/app/db%2Fhost/%C3%A4?raw&type=number", adminKey, 307, "not-leader"},
		{"DELETE", "/api/v1/config/app/k", adminKey, 307, "not-leader"},
		{"PATCH", "/api/v1/config/app", adminKey, 307, "not-leader"},
		{"PUT", "/api/v1/namespaces/app", adminKey, 307, "not-leader"},
		{"DELETE", "/api/v1/namespaces/app", adminKey, 307, "not-leader"},
		{"PUT", "/api/v1/config/app/a//b", adminKey, 400, "bad-request"},
		{"PUT", "/api/v1/config/app/k?rwa", adminKey, 400, "bad-request"},
		{"PUT", "/api/v1/config/app/k", "", 401, "unauthorized"},
		{"PUT", "/api/v1/config/app/k", "wrong", 401, "unauthorized"},
		{"PUT", "/api/v1/config/app/k", readerKey, 403, "forbidden"},
		{"POST", "/api/v1/config/app/k", adminKey, 405, "method-not-allowed"},
	} {
		a, err := do(m.method, f.url+m.path, m.key, `{"value":"1"}`, "Host", "elsewhere.example")
		if err != nil {
			t.Fatal(err)
		}
		want := ""
		if m.status == http.StatusTemporaryRedirect {
			want = leader.url + m.path
		}
		if a.status != m.status || a.slug() != m.slug || a.header.Get("Location") != want {
			t.Errorf("%s %s: %v, Location %q, want %d %s, Location %q", m.method, m.path, a, a.header.Get("Location"), m.status, m.slug, want)
		}
	}
}

// varying is what differs between two answers to the same write.
var varying = regexp.MustCompile(`direct|passed|revision"?[: ]\d+|"version":\d+|\d{4}-\d\d-\d\dT[0-9:.]+Z`)

// TestForward: with Forward a follower passes a write on, and the client cannot
// tell the difference.
func TestForward(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, steady, with("Cluster", "Forward", true))
	leader, f := c.leader(), c.followers()[0]
	type seen struct {
		Status int
		Header http.Header
		Body   string
	}
	for i, m := range []struct {
		method, path, key, body string
		headers                 []string
		status                  int
	}{
		{"PUT", "config/NS/a/b", adminKey, `{"value":"1","type":"number"}`, nil, 201},
		{"PUT", "config/NS/a/b", adminKey, `{"value":"2"}`, nil, 200},
		{"PUT", "config/NS/a/b", adminKey, `{"value":"2"}`, nil, 200}, // changes nothing
		{"PUT", "config/NS/a/b", adminKey, `{"value":"3"}`, []string{"If-None-Match", "*"}, 412},
		{"PUT", "config/NS/a/b", adminKey, `{"value":"3"}`, []string{"If-Match", `"999999"`}, 412},
		{"PUT", "config/NS/a/b", adminKey, `{"value":"3"}`, []string{"If-Match", "*"}, 200},
		{"PUT", "config/NS/a/c", adminKey, `{"value":"3"}`, []string{"If-Match", "*"}, 412},
		{"PUT", "config/NS/a%2Fd%20e?raw&type=json", adminKey, `{"x": 1}`, nil, 201},
		{"PUT", "config/NS/text", adminKey, "plain", []string{"Content-Type", "text/plain"}, 201},
		{"PUT", "config/NS/n", adminKey, `{"value":"x","type":"number"}`, nil, 422},
		{"PUT", "config/NS/n", adminKey, `{"value":`, nil, 400},
		{"PUT", "config/NS/n", adminKey, `{"value":"1"}`, []string{"Content-Encoding", "gzip"}, 415},
		{"PUT", "config/NS/big", adminKey, `{"value":"` + strings.Repeat("x", 1<<20) + `"}`, nil, 201},
		{"PUT", "config/NS/big", adminKey, `{"value":"` + strings.Repeat("x", 1<<20+1) + `"}`, nil, 413},
		{"PUT", "config/NS/n", readerKey, `{"value":"1"}`, nil, 403},
		{"PUT", "config/NS/n", "wrong", `{"value":"1"}`, nil, 401},
		{"PUT", "config/NS/n", "", `{"value":"1"}`, []string{"Authorization", "Bearer " + adminKey}, 201},
		{"PATCH", "config/NS", adminKey, `{"n":null,"o":{"p":1},"q":"r"}`, nil, 200},
		{"DELETE", "config/NS/q", adminKey, "", nil, 204},
		{"DELETE", "config/NS/q", adminKey, "", nil, 404},
		{"PUT", "namespaces/NS", adminKey, `{"description":"d","owner":"o"}`, nil, 200},
		{"DELETE", "namespaces/NS", adminKey, "", nil, 409},
	} {
		var answers []seen
		for _, to := range []struct {
			ns string
			n  *node
		}{{"direct", leader}, {"passed", f}} {
			id := fmt.Sprintf("%s-%d", to.ns, i)
			path := "/api/v1/" + strings.Replace(m.path, "NS", to.ns, 1)
			a, err := do(m.method, to.n.url+path, m.key, m.body, append([]string{"X-Correlation-Id", id}, m.headers...)...)
			if err != nil {
				t.Fatal(err)
			}
			var doc struct{ Revision, Version uint64 }
			json.Unmarshal(a.body, &doc) // 204 has none
			if tag := a.header.Get("ETag"); tag != "" && m.method != "PATCH" && tag != fmt.Sprintf(`"%d"`, doc.Revision) {
				t.Errorf("%s %s at %s: ETag %s of %v", m.method, path, to.n.id, tag, a)
			}
			for _, name := range []string{"Date", "Confman-Revision", "Confman-Node", "Etag", "Content-Length"} {
				if _, ok := a.header[name]; ok {
					a.header[name] = []string{"there"}
				}
			}
			a.header.Set("X-Correlation-Id", strings.Replace(a.header.Get("X-Correlation-Id"), to.ns, "NS", 1))
			answers = append(answers, seen{a.status, a.header, varying.ReplaceAllString(string(a.body), "()")})
		}
		if answers[0].Status != m.status {
			t.Errorf("%s %s: %d %s, want %d", m.method, m.path, answers[0].Status, answers[0].Body, m.status)
		}
		if diff := cmp.Diff(answers[0], answers[1]); diff != "" {
			t.Errorf("%s %s answered (-direct +passed on):\n%s", m.method, m.path, diff)
		}
	}

	type told struct{ Action, Actor, Key, ID, Source string }
	trail := func(ns string) (all []told) {
		for _, e := range f.trail(t, ns) {
			all = append(all, told{e.Action, e.Actor, e.Key, strings.TrimPrefix(e.CorrelationID, ns), e.Source})
		}
		return all
	}
	c.converge()
	if diff := cmp.Diff(trail("direct"), trail("passed")); diff != "" {
		t.Errorf("trails differ (-direct +passed on):\n%s", diff)
	}

	for i := range 50 { // f answers when it has applied the write itself
		put := f.put(t, "app", "k", fmt.Sprint(i))
		if got := f.get(t, "app", "k"); got != put {
			t.Fatalf("%s answered %+v and then shows %+v", f.id, put, got)
		}
	}
	marked := func(n *node) *answer {
		a, err := do("PUT", n.url+keyPath("app", "marked"), adminKey, `{"value":"x"}`, "Confman-Forwarded", "node9")
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	if a := marked(f); a.status != http.StatusServiceUnavailable || a.slug() != "no-leader" {
		t.Errorf("a write that was passed on already, at a follower: %v, want 503 no-leader", a)
	}
	if a := marked(leader); a.status != http.StatusCreated {
		t.Errorf("a write that was passed on already, at the leader: %v, want 201", a)
	}
}

// TestBrokenHop: a write whose way to the leader breaks behind it is of unknown outcome and is
// sent once, whatever its headers say; one that never got there was not applied.
func TestBrokenHop(t *testing.T) {
	t.Parallel()
	c, roads := newLinked(t, 3, "", nil, calm, with("Cluster", "Forward", true))
	c.start()
	leader, f := c.leader(), c.followers()[0]
	road := roads.of(f, leader)
	wantTold := func(what string, a *answer, status int, slug, outcome string) {
		t.Helper()
		var doc struct{ Outcome string }
		if err := json.Unmarshal(a.body, &doc); err != nil || a.status != status || a.slug() != slug || doc.Outcome != outcome {
			t.Errorf("%s: %v, want %d %s, outcome %s", what, a, status, slug, outcome)
		}
	}
	for i, m := range []struct {
		method, body string
		headers      []string
	}{
		{"PUT", `{"value":"v"}`, []string{"If-None-Match", "*"}},
		{"DELETE", "", nil},
		{"PUT", `{"value":"v"}`, []string{"If-None-Match", "*", "Idempotency-Key", "1"}},
		{"DELETE", "", []string{"Idempotency-Key", "2", "X-Idempotency-Key", "2"}},
	} {
		f.put(t, "app", "warm", fmt.Sprint(i)) // there is a connection to use again
		id := fmt.Sprintf("hop-%d", i)
		road.hold(replies, true)
		p := newPending(t, f)
		if err := p.send(m.method, keyPath("app", "k"), m.body, append([]string{"X-Correlation-Id", id}, m.headers...)...); err != nil {
			t.Fatal(err)
		}
		until(t, 10*time.Second, func() error {
			if events := leader.items(t, "/api/v1/audit", url.Values{"correlationId": {id}}); len(events) == 0 {
				return fmt.Errorf("%s %s has not been applied", m.method, id)
			}
			return nil
		})
		road.snap()
		road.hold(replies, false)
		a, err := p.answer()
		if err != nil {
			t.Fatal(err)
		}
		wantTold(m.method+" "+id, a, http.StatusGatewayTimeout, "outcome-unknown", "unknown")
		if events := settled(t, f, "app", id); len(events) != 1 {
			t.Errorf("%s %s is in the trail %d times", m.method, id, len(events))
		}
	}

	road.ln.Close()
	road.snap()
	until(t, 10*time.Second, func() error { // a connection that it still has is found broken first
		a, err := do("PUT", f.url+keyPath("app", "late"), adminKey, `{"value":"v"}`)
		if err != nil {
			return err
		}
		if a.status == http.StatusServiceUnavailable {
			wantTold("a write that cannot reach the leader", a, http.StatusServiceUnavailable, "unavailable", "not-applied")
			return nil
		}
		return fmt.Errorf("%v", a)
	})
}

// runNode runs the program with args in dir until it ends by itself.
func runNode(t *testing.T, dir string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	n := &node{tb: t, id: "node1", args: args, cwd: dir, out: filepath.Join(dir, "run.out"), log: filepath.Join(dir, "run.log")}
	os.Remove(n.out)
	os.Remove(n.log)
	n.start()
	defer n.kill()
	select {
	case <-n.gone:
	case <-time.After(10 * time.Second):
		t.Fatalf("%q still runs after 10s: %s", args, n.logged())
	}
	text, err := os.ReadFile(n.out)
	if err != nil {
		t.Fatal(err)
	}
	return n.cmd.ProcessState.ExitCode(), string(text), n.logged()
}

// wantOneLine complains unless stderr is one line that holds all of want.
func wantOneLine(t *testing.T, stderr string, want ...string) {
	t.Helper()
	if strings.Count(stderr, "\n") != 1 || !strings.HasSuffix(stderr, "\n") {
		t.Errorf("standard error is not one line: %q", stderr)
	}
	for _, w := range want {
		if !strings.Contains(strings.ToLower(stderr), strings.ToLower(w)) {
			t.Errorf("standard error does not name %q: %q", w, stderr)
		}
	}
}

// TestInUse: a second process with the same directory or the same ports ends at
// once with one line and exit status 1; the first does not notice.
func TestInUse(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	first := c.nodes[0]
	first.put(t, "app", "k", "v")

	other := newCluster(t, 1, with("Storage", "DataPath", filepath.Dir(first.data)))
	code, _, stderr := runNode(t, other.dir, other.nodes[0].args...)
	if code != 1 {
		t.Errorf("with a directory in use: exit status %d, want 1", code)
	}
	wantOneLine(t, stderr, first.data)

	for _, addr := range []string{"api", "raft"} {
		other := newCluster(t, 1)
		taken := map[string]string{"api": other.nodes[0].api, "raft": other.nodes[0].raft}[addr]
		ln, err := net.Listen("tcp", taken)
		if err != nil {
			t.Fatal(err)
		}
		code, _, stderr := runNode(t, other.dir, other.nodes[0].args...)
		ln.Close()
		if code != 1 {
			t.Errorf("with the %s port in use: exit status %d, want 1", addr, code)
		}
		wantOneLine(t, stderr, taken)
	}
	if got := first.put(t, "app", "k", "w"); got.Version != 2 {
		t.Errorf("afterwards the first answers %+v, want version 2", got)
	}
}

// sample is the configuration file of the contract, as it stands there.
const sample = `{
  "Cluster": {
    "NodeId": "node1",
    "Nodes": [
      {"Id": "node1", "Address": "10.0.1.10", "ApiPort": 5000, "RaftPort": 5001},
      {"Id": "node2", "Address": "10.0.1.11", "ApiPort": 5000, "RaftPort": 5001},
      {"Id": "node3", "Address": "10.0.1.12", "ApiPort": 5000, "RaftPort": 5001}
    ],
    "LowerElectionTimeout": 300, "UpperElectionTimeout": 600,
    "RequestTimeout": 5000, "MaxStaleness": 5000,
    "Forward": false
  },
  "Storage": {"DataPath": "./data"},
  "Auth": {"ApiKeys": [
    {"Key": "confman_prod_abc123", "Name": "Production Service", "Principal": "svc@prod", "Role": "admin"}
  ]}
}
`

// TestSample: the sample loads as it stands, for each node, whatever the case of
// its member names; so does what must not be refused.
func TestSample(t *testing.T) {
	t.Parallel()
	lower := regexp.MustCompile(`"[A-Za-z]+":`).ReplaceAllStringFunc(sample, strings.ToLower)
	short := strings.Replace(sample, `"LowerElectionTimeout": 300, "UpperElectionTimeout": 600`, `"LowerElectionTimeout": 150`, 1)
	quick := strings.Replace(sample, `300, "UpperElectionTimeout": 600`, `150, "UpperElectionTimeout": 300`, 1)
	for name, text := range map[string]string{"as it stands": sample, "lower case": lower, "one timeout": short, "150 and 300": quick} {
		path := filepath.Join(t.TempDir(), "confman.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, id := range []string{"", "node1", "node2", "node3"} {
			if _, err := loadConfig(path, id); err != nil {
				t.Errorf("%s, -node %q: %v", name, id, err)
			}
		}
	}
	for _, id := range []string{"node1", "node2", "node3"} {
		if _, err := loadConfig("testdata/cluster.json", id); err != nil {
			t.Errorf("-node %q: %v", id, err)
		}
	}
}

// TestFlags: -data replaces DataPath, from the working directory, and -log json
// makes every line of the log a JSON object.
func TestFlags(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	n := c.nodes[0]
	n.args = append(n.args, "-data", "elsewhere", "-log", "json")
	n.data = filepath.Join(c.dir, "elsewhere", n.id)
	c.start()
	n.put(t, "app", "k", "v")
	n.stop()
	for line := range strings.Lines(n.logged()) {
		if err := json.Unmarshal([]byte(line), new(map[string]any)); err != nil {
			t.Errorf("%v in %q", err, line)
		}
	}
	if _, err := os.Stat(filepath.Join(n.data, "state.db")); err != nil {
		t.Error(err)
	}
	n.start() // for the checks at the end
	c.ready()
}

// TestMistakes: a mistake in the configuration is one line that names file and
// member, and exit status 2.
func TestMistakes(t *testing.T) {
	t.Parallel()
	const (
		key  = `{"Key": "confman_prod_abc123", "Name": "Production Service", "Principal": "svc@prod", "Role": "admin"}`
		auth = `"Auth": {"ApiKeys": [{"Key": "k", "Name": "n", "Role": "admin"}]}`
	)
	for _, m := range []struct {
		name     string
		old, new string // what is replaced in the sample
		want     string // what the line names
		args     []string
	}{
		{"unknown member", `"Forward"`, `"Foward"`, "Foward", nil},
		{"unknown section", `"Storage"`, `"Storag"`, "Storag", nil},
		{"unknown member of a node", `"RaftPort": 5001}`, `"RaftPort": 5001, "Weight": 1}`, "Weight", nil},
		{"unknown member of a key", `"Principal"`, `"Princpal"`, "Princpal", nil},
		{"member twice", `"Forward": false`, `"Forward": false, "forward": true`, "forward", nil},
		{"member of another kind", `"Forward": false`, `"Forward": "no"`, "Forward", nil},
		{"old form", `"Nodes"`, `"members"`, "Nodes", nil},
		{"old form beside the new", `"Cluster": {`, `"Cluster": {"members": ["10.0.1.10:5000"],`, "Nodes", nil},
		{"no Nodes", sample, `{"Cluster": {"NodeId": "node1"}, ` + auth + `}`, "Nodes", nil},
		{"empty Nodes", sample, `{"Cluster": {"NodeId": "node1", "Nodes": []}, ` + auth + `}`, "Nodes", nil},
		{"no ApiKeys", `"ApiKeys": [` + "\n    " + key + "\n  ]", "", "ApiKeys", nil},
		{"empty ApiKeys", key, "", "ApiKeys", nil},
		{"no Key", `"Key": "confman_prod_abc123", `, ``, "Key", nil},
		{"unknown role", `"Role": "admin"`, `"Role": "root"`, "Role", nil},
		{"duplicate id", `"Id": "node2"`, `"Id": "node1"`, "Id", nil},
		{"no id", `"Id": "node2", `, ``, "Id", nil},
		{"duplicate port", `"10.0.1.11"`, `"10.0.1.10"`, "Port", nil},
		{"one port for both", `"ApiPort": 5000`, `"ApiPort": 5001`, "Port", nil},
		{"an address with a port", `"Forward": false`, `"Forward": false, "Listen": "0.0.0.0:5000"`, "Listen", nil},
		{"no port", `"RaftPort": 5001}`, `"RaftPort": 0}`, "RaftPort", nil},
		{"impossible port", `"ApiPort": 5000`, `"ApiPort": 70000`, "ApiPort", nil},
		{"upper not twice lower", `"UpperElectionTimeout": 600`, `"UpperElectionTimeout": 500`, "UpperElectionTimeout", nil},
		{"negative time", `"LowerElectionTimeout": 300`, `"LowerElectionTimeout": -300`, "LowerElectionTimeout", nil},
		{"foreign node", `"NodeId": "node1"`, `"NodeId": "node7"`, "NodeId", nil},
		{"foreign -node", ``, ``, "node7", []string{"-node", "node7"}},
		{"no node", `"NodeId": "node1",`, ``, "NodeId", nil},
		{"comma too many", `"Forward": false`, `"Forward": false,`, "", nil},
		{"no colon", `"Forward": false`, `"Forward"; false`, "", nil},
		{"two documents", sample, sample + "{}", "", nil},
		{"no document", sample, "", "", nil},
	} {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			text := strings.Replace(sample, m.old, m.new, 1)
			if text == sample && m.args == nil {
				t.Fatalf("the sample does not hold %q", m.old)
			}
			dir := t.TempDir()
			path := filepath.Join(dir, "mistaken.json")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			code, stdout, stderr := runNode(t, dir, append([]string{"-config", path}, m.args...)...)
			if code != 2 || stdout != "" {
				t.Errorf("exit status %d, standard output %q, want 2 and nothing", code, stdout)
			}
			wantOneLine(t, stderr, "mistaken.json", m.want)
			if strings.Contains(stderr, "confman_prod_abc123") {
				t.Errorf("standard error shows a key: %q", stderr)
			}
		})
	}
	for _, args := range [][]string{{"-data", ""}, {"-node", ""}, {"-config="}} {
		code, _, stderr := runNode(t, t.TempDir(), args...)
		if code != 2 {
			t.Errorf("%q: exit status %d", args, code)
		}
		wantOneLine(t, stderr, args[0][:5])
	}
	code, _, stderr := runNode(t, t.TempDir(), "-config", "missing.json")
	if code != 2 && code != 1 {
		t.Errorf("without the file: exit status %d", code)
	}
	wantOneLine(t, stderr, "missing.json")
}

// TestListen: with Cluster.Listen a node listens there and nowhere else, while the others and
// redirects go on using its Address.
func TestListen(t *testing.T) {
	t.Parallel()
	const host = "127.0.0.2" // all of 127/8 is loopback
	c := newCluster(t, 1, with("Cluster", "Listen", host))
	n := c.nodes[0]
	address := n.url
	for _, at := range []*string{&n.url, &n.api, &n.raft} {
		*at = strings.Replace(*at, "127.0.0.1", host, 1)
	}
	c.start()
	n.put(t, "app", "k", "v")
	if _, st, err := n.status(); err != nil || st.Leader != address {
		t.Errorf("the leader is at %q (%v), want %q", st.Leader, err, address)
	}
	for _, at := range []string{n.api, n.raft} {
		conn, err := net.Dial("tcp", at)
		if err != nil {
			t.Error(err)
		} else {
			conn.Close()
		}
		elsewhere := strings.Replace(at, host, "127.0.0.1", 1)
		if conn, err := net.Dial("tcp", elsewhere); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("with Listen %s it takes a connection to %s (%v)", host, elsewhere, err)
			if err == nil {
				conn.Close()
			}
		}
	}
}

// TestMistakenFlags: a mistake in the arguments is one line that names it, and exit status 2;
// -help lists the flags, and that is no mistake.
func TestMistakenFlags(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, m := range []struct{ args, want string }{
		{"-log xml", "xml"},
		{"-port 80", "-port"},
		{"-data", "-data"},
		{"serve", "serve"},
		{"-log json node2", "node2"},
		{"-version", "-version"},
		{"-check", "missing.json"},
		{"-version -keygen", "-keygen"},
	} {
		// The mistake is found before the file is missed; a program that does not find it starts no node.
		code, stdout, stderr := runNode(t, dir, append([]string{"-config", "missing.json"}, strings.Fields(m.args)...)...)
		if code != 2 || stdout != "" {
			t.Errorf("%s: exit status %d, standard output %q, want 2 and nothing", m.args, code, stdout)
		}
		wantOneLine(t, stderr, m.want)
	}
	code, stdout, stderr := runNode(t, dir, "-help")
	if code != 0 {
		t.Errorf("-help: exit status %d, want 0", code)
	}
	names(t, stdout+stderr, "-config", "-node", "-data", "-log", "-keygen", "-version", "-check")
	code, stdout, stderr = runNode(t, dir, "-version")
	if want := fmt.Sprintf("confman %s %s linux/%s\n", version(), runtime.Version(), runtime.GOARCH); code != 0 || stdout != want || stderr != "" {
		t.Errorf("-version: exit status %d, %q, %q, want %q", code, stdout, stderr, want)
	}
}

// TestAlone: without a file one node serves in a fresh directory, makes a key
// once and prints a command that works; it finds both again.
func TestAlone(t *testing.T) {
	t.Parallel()
	const port = "5000" // and 5001, in every process of these tests that comes here
	until(t, 60*time.Second, func() error {
		f, err := lockFile("alone", syscall.LOCK_NB)
		if err == nil {
			t.Cleanup(func() { f.Close() })
		}
		return err
	})
	for _, addr := range []string{"127.0.0.1:5000", "127.0.0.1:5001"} {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			t.Skipf("something else listens: %v", err)
		}
		ln.Close()
	}
	dir := t.TempDir()
	n := &node{
		tb: t, id: "node1", url: "http://127.0.0.1:" + port, cwd: dir, data: filepath.Join(dir, "data", "node1"),
		out: filepath.Join(dir, "out"), log: filepath.Join(dir, "log"),
	}
	c := &cluster{tb: t, dir: dir, nodes: []*node{n}, finished: true}
	t.Cleanup(c.dispose)
	printed := func(line string) (found []string) {
		until(t, 10*time.Second, func() error {
			text, err := os.ReadFile(n.out)
			if found = regexp.MustCompile("(?m)^" + line + "$").FindStringSubmatch(string(text)); found == nil {
				return fmt.Errorf("no line %q in %q (%v)", line, text, err)
			}
			return nil
		})
		return found
	}

	n.start()
	found := printed(`admin key (cm_[A-Za-z0-9_-]{43}), kept in (.*)`)
	key, path := found[1], found[2]
	if !filepath.IsAbs(path) {
		path = filepath.Join(dir, path)
	}
	kept, err := os.ReadFile(path)
	if err != nil || strings.TrimSpace(string(kept)) != key || path != filepath.Join(n.data, "admin.key") {
		t.Errorf("%s holds %q, printed is %q (%v)", path, kept, key, err)
	}
	sh := exec.Command("sh", "-c", printed(`curl .*`)[0])
	sh.Dir = t.TempDir() // it works from anywhere
	sh.WaitDelay = 10 * time.Second
	if text, err := sh.CombinedOutput(); err != nil || strings.Contains(string(text), "https://confman/errors/") {
		t.Errorf("%q: %v\n%s", sh.Args, err, text)
	} else {
		t.Logf("%q prints\n%s", sh.Args, text)
	}
	n.signal(syscall.SIGHUP)
	until(t, 10*time.Second, func() error {
		if !strings.Contains(n.logged(), `level=WARN msg="SIGHUP: there is no configuration file to read again"`) {
			return errors.New("SIGHUP leaves no line in the log")
		}
		return nil
	})
	if a, err := do("PUT", n.url+keyPath("alone", "k"), key, `{"value":"kept"}`); err != nil || a.status != http.StatusCreated {
		t.Errorf("PUT with the made key: %v, %v", a, err)
	}
	n.signal(os.Interrupt)
	n.ended()

	if err := os.Remove(n.out); err != nil {
		t.Fatal(err)
	}
	n.start()
	if again := printed(`admin key in (.*)`); again[1] != found[2] {
		t.Errorf("the second start prints %q, the first %q", again[1], found[2])
	}
	until(t, 10*time.Second, n.ready)
	a, err := do("GET", n.url+keyPath("alone", "k")+"?raw", "", "", "Authorization", "Bearer "+key)
	if err != nil || string(a.body) != "kept" {
		t.Errorf("after the restart: %v, %v", a, err)
	}
	n.stop()
	text, err := os.ReadFile(n.out)
	if err != nil || strings.Contains(string(text)+n.logged(), key) {
		t.Errorf("a later start, or a log, shows the key: %s%s (%v)", text, n.logged(), err)
	}
}
