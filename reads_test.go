package main

// Consistent reads of a leader that was replaced without knowing, reading one's own
// writes, and what all this costs.

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

// A pending request is on its way to a node, on a connection of its own.
type pending struct {
	conn net.Conn
	r    *bufio.Reader
	sent [][2]string // method and target of what has no answer yet
}

// newPending connects to a node.
func newPending(tb testing.TB, n *node) *pending {
	tb.Helper()
	conn, err := net.DialTimeout("tcp", n.api, 5*time.Second)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	return &pending{conn: conn, r: bufio.NewReader(conn)}
}

// send writes a request; it is in the node's socket then, whatever the node does.
func (p *pending) send(method, path, body string, headers ...string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: test\r\nX-API-Key: %s\r\nContent-Length: %d\r\n", method, path, adminKey, len(body))
	for i := 0; i < len(headers); i += 2 {
		fmt.Fprintf(&b, "%s: %s\r\n", headers[i], headers[i+1])
	}
	b.WriteString("\r\n" + body)
	p.conn.SetDeadline(time.Now().Add(limit(15 * time.Second)))
	p.sent = append(p.sent, [2]string{method, path})
	_, err := p.conn.Write([]byte(b.String()))
	return err
}

// answer reads the answer to the oldest request that has none.
func (p *pending) answer() (*answer, error) {
	resp, err := http.ReadResponse(p.r, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	a := &answer{resp.StatusCode, resp.Header, text}
	if len(p.sent) == 0 || a.status < 200 {
		return a, nil // a test has written the request itself, or the answer is still to come
	}
	sent := p.sent[0]
	p.sent = p.sent[1:]
	return a, documented(sent[0], sent[1], a)
}

// knows waits until n answers a consistent read of app/k, which must show want.
func (n *node) knows(tb testing.TB, want entryDoc) {
	tb.Helper()
	until(tb, 15*time.Second, func() error {
		a := n.ask(tb, "GET", keyPath("app", "k")+"?consistent", "")
		if a.status != http.StatusOK {
			return fmt.Errorf("%s: %v", n.id, a)
		}
		var got entryDoc
		if err := json.Unmarshal(a.body, &got); err != nil || got != want {
			tb.Fatalf("%s answers a consistent read with %v, want %+v", n.id, a, want)
		}
		return nil
	})
}

// A gun keeps consistent reads of one key in flight at a node.
type gun struct {
	done atomic.Int64 // answers that are no refusals
	wg   sync.WaitGroup
	quit chan struct{}
}

// fire keeps count reads of path in flight at n until stop.
func fire(tb testing.TB, n *node, path string, count int) *gun {
	g := &gun{quit: make(chan struct{})}
	for range count {
		p := newPending(tb, n)
		g.wg.Go(func() {
			for {
				select {
				case <-g.quit:
					return
				default:
				}
				if p.send("GET", path, "") != nil {
					return
				}
				a, err := p.answer()
				if err != nil {
					return
				}
				if a.status == http.StatusOK {
					g.done.Add(1)
				}
			}
		})
	}
	return g
}

// hot waits until n more reads are answered.
func (g *gun) hot(tb testing.TB, n int64) {
	tb.Helper()
	want := g.done.Load() + n
	until(tb, limit(10*time.Second), func() error {
		if got := g.done.Load(); got < want {
			return fmt.Errorf("%d reads are answered, want %d", got, want)
		}
		return nil
	})
}

func (g *gun) stop() {
	close(g.quit)
	g.wg.Wait()
}

// pauseTrial pauses the leader with consistent reads in flight, writes elsewhere, sends it
// more reads and lets it go on. It returns how many answers to those are stale. Most of them are
// refused, for the leader finds out that it was replaced before it knows by whom; asked again, it
// must answer.
func pauseTrial(t *testing.T, c *cluster, value string) (stale, answered int) {
	t.Helper()
	const late = 8
	path := keyPath("app", "k") + "?consistent"
	old := c.leader()
	old.put(t, "app", "k", "before "+value)
	var reads []*pending
	for range late {
		reads = append(reads, newPending(t, old))
	}
	g := fire(t, old, path, 8)
	defer g.stop()
	g.hot(t, 40)
	old.pause()
	stoodStill(t, old)
	want := c.leader().put(t, "app", "k", "after "+value)
	for _, p := range reads {
		if err := p.send("GET", path, ""); err != nil {
			t.Fatal(err)
		}
	}
	old.resume()
	for _, p := range reads {
		a, err := p.answer()
		if err != nil {
			t.Fatal(err)
		}
		var got entryDoc
		switch {
		case a.status == http.StatusServiceUnavailable && (a.slug() == "no-leader" || a.slug() == "behind"):
		case a.status != http.StatusOK || json.Unmarshal(a.body, &got) != nil:
			t.Errorf("a read sent during the pause is answered with %v", a)
		default:
			if answered++; got != want {
				stale++
			}
		}
		p.conn.Close()
	}
	c.ready()
	c.leader() // old knows him too
	old.knows(t, want)
	return stale, answered
}

// quick lets a trial be short: an election takes a fifth of a second.
var quick = with("Cluster", "LowerElectionTimeout", 100)

// TestConsistentAfterPause: what a leader is asked while it is paused, and another leads, it
// does not answer with what it knew.
func TestConsistentAfterPause(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, quick)
	stale, answered, trials := 0, 0, rounds(5, 500)
	for i := range trials {
		s, a := pauseTrial(t, c, strconv.Itoa(i))
		stale, answered = stale+s, answered+a
	}
	t.Logf("%d trials: %d reads answered, %d of them stale", trials, answered, stale)
	if stale > 0 {
		t.Errorf("%d stale answers in %d trials", stale, trials)
	}
}

// TestVerifyLeaderAfterPause counts what the same trials show where ?consistent trusts
// VerifyLeader. Chance decides, so only the long run makes them.
func TestVerifyLeaderAfterPause(t *testing.T) {
	trials := rounds(0, 500)
	if trials == 0 {
		t.Skip("CONFMAN_LONG is not set; TestLateAcknowledgements shows the same at once")
	}
	t.Parallel()
	c, _ := newLinked(t, 3, weaker, nil, quick)
	c.start()
	stale, answered, bad := 0, 0, 0
	for i := range trials {
		s, a := pauseTrial(t, c, strconv.Itoa(i))
		stale, answered = stale+s, answered+a
		bad += min(s, 1)
	}
	t.Logf("VerifyLeader, %d trials: %d reads answered, %d of them stale, in %d trials", trials, answered, stale, bad)
	if answered == 0 {
		t.Error("no read was answered: the trials show nothing")
	}
}

// TestLateAcknowledgements: what followers said before a read began does not confirm it,
// however late it arrives. A leader that trusts VerifyLeader is confirmed by it and serves
// what was overwritten: this test can fail.
func TestLateAcknowledgements(t *testing.T) {
	t.Parallel()
	t.Run("confirmLeadership", func(t *testing.T) {
		t.Parallel()
		if stale, _ := lateAcknowledgements(t, ""); stale > 0 {
			t.Errorf("%d stale answers", stale)
		}
	})
	t.Run("VerifyLeader", func(t *testing.T) {
		t.Parallel()
		if stale, answered := lateAcknowledgements(t, weaker); stale == 0 {
			t.Errorf("VerifyLeader gave %d answers, none of them stale: this test shows nothing", answered)
		}
	})
}

// lateAcknowledgements holds back what followers say to a leader of a long lease, lets them
// choose another, writes there, asks the old leader and lets it hear. One that is not misled
// refuses, mostly; asked again, it must answer.
func lateAcknowledgements(t *testing.T, prefix string) (stale, answered int) {
	c, roads := newLinked(t, 3, prefix, func(id string, doc map[string]any) {
		lower := 500
		if id == "node1" {
			lower = 8000 // its lease, too: it believes in itself for as long
		}
		with("Cluster", "LowerElectionTimeout", lower)(doc)
	}, with("Cluster", "RequestTimeout", 3000))
	old, others := c.nodes[0], c.nodes[1:]
	// One of the others stands for election first. Stopped cleanly, it hands over to the only
	// one that is left.
	c.start()
	if leader := c.leader(); leader != old {
		for _, n := range others {
			if n != leader {
				n.kill()
			}
		}
		leader.stop()
		for _, n := range others {
			n.start()
		}
		c.ready()
	}
	if leader := c.leader(); leader != old {
		t.Fatalf("%s leads, want %s", leader.id, old.id)
	}
	before := old.put(t, "app", "k", "before")
	c.converge()

	for _, n := range others {
		roads.of(old, n).hold(replies, true)
	}
	until(t, 10*time.Second, func() error {
		for _, n := range others {
			if roads.of(old, n).holds(replies) < 2 { // on the connections of heartbeats and of appends
				return fmt.Errorf("%d answers of %s are held", roads.of(old, n).holds(replies), n.id)
			}
		}
		return nil
	})
	roads.cut(old, true)
	next := c.leaderOf(others)
	after := next.put(t, "app", "k", "after")

	var reads []*pending
	for range 8 {
		p := newPending(t, old)
		if err := p.send("GET", keyPath("app", "k")+"?consistent", ""); err != nil {
			t.Fatal(err)
		}
		reads = append(reads, p)
	}
	// By the time that it has answered so much else, it has begun what it was asked before.
	begun := func() {
		t.Helper()
		for range 100 {
			if _, st, err := old.status(); err != nil || st.Role != "leader" {
				t.Fatalf("%s is %+v, %v; it should believe that it leads", old.id, st, err)
			}
		}
	}
	begun()
	// One after the other, since a question of its own may be before the readers': the first
	// confirms that one, the second theirs.
	for _, n := range others {
		roads.of(old, n).hold(replies, false)
		until(t, 10*time.Second, func() error {
			if got := roads.of(old, n).holds(replies); got > 0 {
				return fmt.Errorf("%d answers of %s are held still", got, n.id)
			}
			return nil
		})
		begun()
	}
	roads.cut(old, false)
	for _, p := range reads {
		a, err := p.answer()
		if err != nil {
			t.Fatal(err)
		}
		if a.status != http.StatusOK {
			if slug := a.slug(); slug != "no-leader" && slug != "behind" {
				t.Errorf("a consistent read is answered with %v", a)
			}
			continue
		}
		var got entryDoc
		if err := json.Unmarshal(a.body, &got); err != nil {
			t.Fatal(err)
		}
		switch answered++; got {
		case before:
			stale++
		case after:
		default:
			t.Errorf("a consistent read is answered with %v", a)
		}
	}
	c.ready()
	c.leader() // old knows him too
	old.knows(t, after)
	return stale, answered
}

// TestNewLeader: a leader that has just been elected holds what its predecessor acknowledged, but
// knows that it is committed only when an entry of its own term is. Until then it answers no
// consistent read.
func TestNewLeader(t *testing.T) {
	t.Parallel()
	c, roads := newLinked(t, 3, "", nil, plaintext, with("Cluster", "RequestTimeout", 1500), with("Cluster", "LowerElectionTimeout", 500))
	c.start()
	a := c.leader()
	b, third := c.followers()[0], c.followers()[1]
	before := a.put(t, "app", "k", "before")
	c.converge()

	// B alone gets the entry, so B has it when it is acknowledged and nobody else can be elected.
	// That it is committed B would hear with the next append.
	roads.of(a, third).set(func() { roads.of(a, third).stops = hasEntries })
	roads.of(a, b).set(func() { roads.of(a, b).after = []byte("acknowledged") })
	want := a.put(t, "app", "k", "acknowledged")
	// B leads, for its heartbeats are answered, and commits nothing.
	roads.of(b, third).set(func() { roads.of(b, third).stops = hasEntries })
	a.kill()
	var first readyDoc
	until(t, 15*time.Second, func() (err error) {
		if _, first, err = b.status(); err != nil || first.Role != "leader" {
			return fmt.Errorf("%s is %+v, %v", b.id, first, err)
		}
		return nil
	})
	if got := b.get(t, "app", "k"); got != before {
		t.Fatalf("%s has %+v, which it should not know to be committed", b.id, got)
	}
	if got := b.ask(t, "GET", keyPath("app", "k")+"?consistent", ""); got.status != http.StatusServiceUnavailable || got.slug() != "no-leader" {
		t.Errorf("%s has committed nothing and answers a consistent read with %v; acknowledged is %+v", b.id, got, want)
	}
	if _, st, err := b.status(); err != nil || st.Role != "leader" || st.Term != first.Term {
		t.Logf("%s did not lead all the time: %+v, %v; less is shown", b.id, st, err)
	}

	for _, l := range roads {
		l.set(func() { l.held, l.stops, l.after = [2]bool{}, nil, nil })
	}
	b.knows(t, want)
	a.start()
	c.ready()
}

// aloneInMemory makes a node that leads a cluster of itself and whose raft keeps nothing on the disk.
func aloneInMemory(t *testing.T, st *store) *raftNode {
	t.Helper()
	conf := raft.DefaultConfig()
	conf.LocalID = "node1"
	conf.Logger = hclog.NewNullLogger()
	conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout = 50*time.Millisecond, 50*time.Millisecond, 50*time.Millisecond
	logs, snaps := raft.NewInmemStore(), raft.NewInmemSnapshotStore()
	addr, trans := raft.NewInmemTransport("node1")
	if err := raft.BootstrapCluster(conf, logs, logs, snaps, trans, raft.Configuration{Servers: []raft.Server{{ID: conf.LocalID, Address: addr}}}); err != nil {
		t.Fatal(err)
	}
	r, err := raft.NewRaft(conf, newMachine(t, st), logs, logs, snaps, trans)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Shutdown().Error() })
	until(t, 10*time.Second, func() error {
		if r.State() != raft.Leader {
			return errors.New("nobody leads")
		}
		return nil
	})
	n := &raftNode{id: "node1", store: st, log: slog.New(slog.DiscardHandler), ctx: t.Context(), cfg: defaults()}
	if n.recent, err = raft.NewLogCache(64, logs); err != nil {
		t.Fatal(err)
	}
	n.raft.Store(r)
	n.led.Store(r.CurrentTerm())
	return n
}

// TestConfirmed: a leader is as fresh as it was before it asked the others whether it leads, and
// only if they say yes and nothing has changed meanwhile. It runs beside no other test, for
// confirmLeadership is everyone's.
func TestConfirmed(t *testing.T) {
	defer func(f func(*raftNode, uint64) error) { confirmLeadership = f }(confirmLeadership)
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"))
	n := aloneInMemory(t, w.st)
	term := n.led.Load()
	for _, m := range []struct {
		name  string
		meets func() error // what comes of the question
		want  error        // if it is a certain one
		fresh bool
	}{
		{"no majority", func() error { return errors.New("no majority") }, nil, false},
		{"the term ends meanwhile", func() error { n.led.Store(0); return nil }, errNotLeading, false},
		{"a majority", func() error { return nil }, nil, true},
		{"no majority, later", func() error { return errors.New("no majority") }, nil, false},
		{"a majority again", func() error { return nil }, nil, true},
	} {
		n.led.Store(term)
		before := n.freshSince.Load()
		var during *time.Time
		var asked time.Time
		confirmLeadership = func(_ *raftNode, of uint64) error {
			if of != term {
				t.Errorf("%s: asked for term %d, want %d", m.name, of, term)
			}
			during, asked = n.freshSince.Load(), time.Now()
			for !time.Now().After(asked) { // so that a time taken behind it is a later one
			}
			return m.meets()
		}
		rev, err := n.answer(t.Context(), readable)
		after := n.freshSince.Load()
		if during != before {
			t.Errorf("%s: the node is called fresh since %v while it asks", m.name, during)
		}
		switch {
		case !m.fresh && (err == nil || m.want != nil && err != m.want || after != before):
			t.Errorf("%s: revision %d, %v, fresh since %v; before since %v", m.name, rev, err, after, before)
		case m.fresh && (err != nil || rev != 1 || after == before || after.After(asked)):
			t.Errorf("%s: revision %d, %v, fresh since %v; want 1 and a time before %v", m.name, rev, err, after, asked)
		}
	}
}

// TestOwnWrites: with Confman-Min-Revision a client reads its own write at any node.
func TestOwnWrites(t *testing.T) {
	t.Parallel()
	const timeout = time.Second
	c := startCluster(t, 3, calm, with("Cluster", "RequestTimeout", timeout.Milliseconds()))
	path := keyPath("own", "k")
	leader := c.leader()
	for i := range 50 {
		want := leader.put(t, "own", "k", strconv.Itoa(i))
		for _, n := range c.nodes {
			for _, form := range readForms {
				a := n.ask(t, "GET", path+form, "", "Confman-Min-Revision", strconv.FormatUint(want.Revision, 10))
				var got entryDoc
				if err := json.Unmarshal(a.body, &got); err != nil || got != want {
					t.Fatalf("%s shows %v to a reader %q of revision %d", n.id, a, form, want.Revision)
				}
				if rev, err := strconv.ParseUint(a.header.Get("Confman-Revision"), 10, 64); err != nil || rev < want.Revision {
					t.Fatalf("%s shows revision %q to a reader of %d", n.id, a.header.Get("Confman-Revision"), want.Revision)
				}
			}
		}
	}
	_, st, err := leader.status()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range c.nodes {
		for _, v := range []string{"", "x", "-1", "1.5", " ", "1,2", "18446744073709551616", `"1"`} {
			if a := n.ask(t, "GET", path, "", "Confman-Min-Revision", v); a.status != http.StatusBadRequest {
				t.Errorf("Confman-Min-Revision %q at %s: %v, want 400", v, n.id, a)
			}
		}
		start := time.Now()
		a := n.ask(t, "GET", path+"?stale", "", "Confman-Min-Revision", strconv.FormatUint(st.Revision+1000, 10))
		if took := time.Since(start); a.status != http.StatusServiceUnavailable || a.slug() != "behind" || a.header.Get("Retry-After") == "" ||
			took < timeout || took > timeout+limit(time.Second) {
			t.Errorf("a revision that is not there, at %s: %v, %v after %v; want 503 behind after %v", n.id, a, a.header, took, timeout)
		}
	}

	// Every kind of read waits, and is woken by the write.
	for _, target := range []string{path, "/api/v1/config/own", "/api/v1/namespaces", "/api/v1/namespaces/own", "/api/v1/namespaces/own/keys",
		"/api/v1/audit/own", "/api/v1/audit", keyPath("own", "missing")} {
		for _, n := range c.nodes {
			_, st, err := leader.status()
			if err != nil {
				t.Fatal(err)
			}
			p := newPending(t, n)
			next := strconv.FormatUint(st.Revision+1, 10)
			if err := p.send("GET", target, "", "Confman-Min-Revision", next); err != nil {
				t.Fatal(err)
			}
			leader.put(t, "own", "k", "for "+next)
			a, err := p.answer()
			if err != nil {
				t.Fatal(err)
			}
			want := http.StatusOK
			if strings.HasSuffix(target, "missing") {
				want = http.StatusNotFound
			}
			if rev, err := strconv.ParseUint(a.header.Get("Confman-Revision"), 10, 64); err != nil || rev < st.Revision+1 || a.status != want {
				t.Errorf("GET %s of revision %s at %s: %v, Confman-Revision %s", target, next, n.id, a, a.header.Get("Confman-Revision"))
			}
			if ms, err := strconv.Atoi(a.header.Get("Confman-Staleness-Ms")); err != nil || ms < 0 || ms > 5000 {
				t.Errorf("GET %s at %s: Confman-Staleness-Ms %q", target, n.id, a.header.Get("Confman-Staleness-Ms"))
			}
			p.conn.Close()
		}
	}
}

// TestQuestions: consistent reads share questions, plain reads ask none, and neither
// makes entries in the log.
func TestQuestions(t *testing.T) {
	t.Parallel()
	c, roads := newLinked(t, 3, "", nil, plaintext, calm)
	c.start()
	c.leader().put(t, "app", "k", "v")
	c.converge()
	asked := func() (all int) {
		for _, l := range roads {
			all += l.asked()
		}
		return all
	}
	// Without clients, each second: a question of each follower, which the leader passes on
	// to both others to be confirmed, the leader's own of that kind, and now and then whether
	// the trails agree.
	background := func(d time.Duration) int { return int(10*d.Seconds()) + 16 }
	const clients = 32
	reads := 32 * clients
	for _, n := range c.nodes {
		for _, form := range readForms {
			text := []byte("GET " + keyPath("app", "k") + form + " HTTP/1.1\r\nHost: test\r\nX-API-Key: " + adminKey + "\r\n\r\n")
			f := newFleet(t, n.api, clients)
			start, before := time.Now(), asked()
			f.drive(t, reads, func() func(int) []byte { return func(int) []byte { return text } })
			took, got := time.Since(start), asked()-before
			most := background(took)
			if form == "?consistent" {
				most += reads / 2 // each question is at least shared by six: on a follower it makes three
			}
			if got > most {
				t.Errorf("%d reads %q at %s asked %d questions in %v, want at most %d", reads, form, n.id, got, took, most)
			}
			for _, w := range f {
				w.conn.Close()
			}
		}
	}
	c.finish()
	db, err := raftboltdb.New(raftboltdb.Options{Path: filepath.Join(c.nodes[0].data, "raft.db")})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if last, err := db.LastIndex(); err != nil || last > 30 {
		t.Errorf("after %d reads and one write the log ends at %d (%v)", 9*reads, last, err)
	}
}

// TestShared: who waits for a call gets one that began after he came, only one runs at a
// time, and many who wait share one. Giving up ends the wait and not the call.
func TestShared(t *testing.T) {
	t.Parallel()
	const clients, each = 32, 100
	var (
		s          shared
		begun, now atomic.Int64
		wg         sync.WaitGroup
	)
	f := func() (uint64, error) {
		if now.Add(1) != 1 {
			t.Error("two calls run at once")
		}
		defer now.Add(-1)
		n := begun.Add(1)
		time.Sleep(100 * time.Microsecond) // what a question takes
		return uint64(n), nil
	}
	for range clients {
		wg.Go(func() {
			for range each {
				came := begun.Load()
				if got, err := s.do(t.Context(), f); err != nil || got <= uint64(came) {
					t.Errorf("call %d, %v, for one who came during call %d", got, err, came)
				}
			}
		})
	}
	wg.Wait()
	if calls := begun.Load(); calls > clients*each/4 {
		t.Errorf("%d calls for %d who waited", calls, clients*each)
	} else {
		t.Logf("%d calls for %d who waited", calls, clients*each)
	}

	over, cancel := context.WithCancel(t.Context())
	cancel()
	ended := make(chan struct{})
	_, err := s.do(over, func() (uint64, error) {
		time.Sleep(time.Millisecond)
		close(ended)
		return 0, nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a wait that is given up: %v", err)
	}
	<-ended
}

// TestLeaderAppliesLate: a follower may have applied what its leader, who committed it, has not.
// After a read with ?consistent has shown that, no later one anywhere shows less, and a stream that
// has sent it goes on at the leader.
func TestLeaderAppliesLate(t *testing.T) {
	t.Parallel()
	free := []*volume{newVolume(t, 64), newVolume(t, 64), newVolume(t, 64)}
	c := newCluster(t, 3)
	vols := map[*node]*volume{}
	for i, n := range c.nodes {
		vols[n] = free[i]
		if err := os.MkdirAll(n.data, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(vols[n].dir, "state.db"), filepath.Join(n.data, "state.db")); err != nil {
			t.Fatal(err)
		}
	}
	c.start()
	c.nodes[0].put(t, "app", "k", "old")
	c.converge()
	leader, f := c.leader(), c.followers()[0]
	vols[leader].freeze() // its log, on another file system, goes on
	thaw := sync.OnceFunc(vols[leader].thaw)
	defer thaw()
	p := newPending(t, leader)
	if err := p.send("PUT", keyPath("app", "k"), `{"value":"new"}`); err != nil {
		t.Fatal(err)
	}
	var shown entryDoc
	until(t, 5*time.Second, func() error {
		a, err := do("GET", f.url+keyPath("app", "k")+"?stale", readerKey, "")
		if err != nil {
			return err
		}
		if err := json.Unmarshal(a.body, &shown); err != nil || shown.Value != "new" {
			return fmt.Errorf("%s shows %v, %v", f.id, a, err)
		}
		return nil
	})
	type seen struct {
		at, what string
		a        *answer
		err      error
	}
	answers := make(chan seen)
	later := 0
	for _, n := range c.nodes {
		for what, get := range map[string]func() (*answer, error){
			"read": func() (*answer, error) { return do("GET", n.url+keyPath("app", "k")+"?consistent", readerKey, "") },
			"wait": func() (*answer, error) {
				return do("GET", n.url+keyPath("app", "k")+"?wait=100ms", readerKey, "", "If-None-Match", fmt.Sprintf(`"%d"`, shown.Revision))
			},
		} {
			later++
			go func() {
				a, err := get()
				answers <- seen{n.id, what, a, err}
			}()
		}
	}
	time.AfterFunc(500*time.Millisecond, thaw) // the fault's length
	for range later {
		s := <-answers
		ok := s.err == nil && (s.a.status == http.StatusOK && strings.Contains(string(s.a.body), `"new"`) ||
			s.a.status == http.StatusServiceUnavailable || s.what == "wait" && s.a.status == http.StatusNotModified)
		if !ok {
			t.Errorf("%s at %s, after revision %d was shown: %v, %v", s.what, s.at, shown.Revision, s.a, s.err)
		}
	}
	if a, err := p.answer(); err != nil || a.status != http.StatusOK {
		t.Errorf("the write: %v, %v", a, err)
	}
}
