package main

// Writes whose outcome nobody was told: when they are given up they are never made
// later, and the trail says so.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

// randomTimes makes times of all kinds in which a leader may append an entry: with and
// without a monotonic clock, in any zone.
func randomTimes(n int) (times []time.Time) {
	zones := []*time.Location{time.UTC, time.Local, time.FixedZone("east", 5*3600+1800), time.FixedZone("west", -11*3600)}
	for i := range n {
		at := time.Now()
		if i%2 == 0 {
			at = time.Unix(0, rand.Int64())
		}
		times = append(times, at.In(zones[i%len(zones)]).Add(time.Duration(rand.IntN(1e9))))
	}
	return times
}

// TestAppendedAt: the time at which a leader appended an entry comes out of the log and of
// the transport as it went in, to the nanosecond. Replicas decide by it, see command.Until.
func TestAppendedAt(t *testing.T) {
	t.Parallel()
	var logs []*raft.Log
	for i, at := range randomTimes(1000) {
		logs = append(logs, &raft.Log{Index: uint64(i + 1), Term: 1, Type: raft.LogCommand, Data: []byte("x"), AppendedAt: at})
	}
	same := func(where string, got *raft.Log) {
		t.Helper()
		want := logs[got.Index-1]
		if got.AppendedAt.UnixNano() != want.AppendedAt.UnixNano() {
			t.Errorf("%s: entry %d, appended at %v, comes back with %v", where, got.Index, want.AppendedAt, got.AppendedAt)
		}
	}

	db, err := raftboltdb.New(raftboltdb.Options{Path: filepath.Join(t.TempDir(), "raft.db"), NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.StoreLogs(logs); err != nil {
		t.Fatal(err)
	}
	for _, want := range logs {
		var got raft.Log
		if err := db.GetLog(want.Index, &got); err != nil {
			t.Fatal(err)
		}
		same("log", &got)
	}

	var ends []*raft.NetworkTransport
	for range 2 {
		tr, err := raft.NewTCPTransportWithLogger("127.0.0.1:0", nil, 1, 5*time.Second, hclog.NewNullLogger())
		if err != nil {
			t.Fatal(err)
		}
		defer tr.Close()
		ends = append(ends, tr)
	}
	go func() {
		for rpc := range ends[1].Consumer() {
			for _, got := range rpc.Command.(*raft.AppendEntriesRequest).Entries {
				same("transport", got)
			}
			rpc.Respond(&raft.AppendEntriesResponse{Success: true}, nil)
		}
	}()
	for batch := range slices.Chunk(logs, 100) {
		var resp raft.AppendEntriesResponse
		req := &raft.AppendEntriesRequest{Term: 1, Entries: batch}
		if err := ends[0].AppendEntries("x", ends[1].LocalAddr(), req, &resp); err != nil || !resp.Success {
			t.Fatalf("append: %+v, %v", resp, err)
		}
	}
}

// A future is an entry whose end is known.
type future struct {
	raft.ApplyFuture // what is not asked
	err              error
	response         any
}

func (f future) Error() error  { return f.err }
func (f future) Response() any { return f.response }

// TestSettle: everyone whose command was in an entry is told once what became of it, and "not
// applied" only where raft says that the entry never was in its log.
func TestSettle(t *testing.T) {
	t.Parallel()
	one, two := &result{rev: 1}, &result{rev: 2}
	for _, m := range []struct {
		name string
		f    future
		want *kind // nil: each its own result
	}{
		{"applied", future{response: []*result{one, two}}, nil},
		{"not the leader", future{err: raft.ErrNotLeader}, errNoLeader},
		{"being handed over", future{err: raft.ErrLeadershipTransferInProgress}, errUnavailable},
		{"not taken in time", future{err: raft.ErrEnqueueTimeout}, errUnavailable},
		{"leadership lost", future{err: raft.ErrLeadershipLost}, errUnknown},
		{"shut down", future{err: raft.ErrRaftShutdown}, errUnknown},
		{"a store's error", future{err: io.ErrShortWrite}, errUnknown},
		{"a store's error, with an answer", future{err: io.ErrShortWrite, response: []*result{one, two}}, errUnknown},
		{"not seen by the state machine", future{}, errUnknown},
		{"an answer of another kind", future{response: io.ErrShortWrite}, errUnknown},
		{"no answers", future{response: []*result{}}, errUnknown},
		{"too few answers", future{response: []*result{one}}, errUnknown},
		{"too many answers", future{response: []*result{one, two, one}}, errUnknown},
	} {
		var batch []*proposal
		for range 2 {
			batch = append(batch, &proposal{done: make(chan outcome, 1)})
		}
		settle(batch, m.f) // it would hang on a second outcome for the same one
		for i, p := range batch {
			var got outcome
			select {
			case got = <-p.done:
			default:
				t.Errorf("%s: command %d is told nothing", m.name, i)
				continue
			}
			switch {
			case m.want == nil && (got.err != nil || got.res != []*result{one, two}[i]):
				t.Errorf("%s: command %d is told %+v, %v; want its own result", m.name, i, got.res, got.err)
			case m.want != nil && (got.err == nil || problemOf(got.err).kind != m.want || got.res != nil):
				t.Errorf("%s: command %d is told %+v, %v; want %s", m.name, i, got.res, got.err, m.want.slug)
			}
		}
	}
}

// settled asks n what became of the write with a correlation id, until it can say.
func settled(tb testing.TB, n *node, ns, id string) (events []eventDoc) {
	tb.Helper()
	until(tb, 15*time.Second, func() error {
		a, err := do("GET", n.url+"/api/v1/audit/"+ns+"?consistent&correlationId="+id, adminKey, "")
		if err != nil {
			return err
		}
		var page struct{ Items []eventDoc }
		if a.status != http.StatusOK {
			if slug := a.slug(); slug != "no-leader" && slug != "behind" {
				tb.Fatalf("%s settles %s with %v", n.id, id, a)
			}
			return fmt.Errorf("%s: %v", n.id, a)
		}
		events = nil
		if err := json.Unmarshal(a.body, &page); err != nil {
			tb.Fatal(err)
		}
		events = page.Items
		return nil
	})
	return events
}

// TestGivenUp: a request that its sender has given up is not proposed any more, by a leader
// that leads before and after it stood still, nor by one that was slow to get it; one
// that was proposed in time is found by whoever settles it.
func TestGivenUp(t *testing.T) {
	t.Parallel()
	const timeout = 500 * time.Millisecond
	c, roads := newLinked(t, 3, "", nil, with("Cluster", "RequestTimeout", timeout.Milliseconds()), with("Cluster", "Forward", true),
		with("Cluster", "LowerElectionTimeout", 1500)) // longer than the pauses
	c.start()
	leader := c.leader()
	f := c.followers()[0]
	until(t, limit(15*time.Second), func() error { // such a short RequestTimeout needs a machine that is awake
		a, err := do("PATCH", leader.url+"/api/v1/config/app", adminKey, `{"k":"there","d":"there"}`)
		if err == nil && a.status != http.StatusOK {
			err = fmt.Errorf("%v", a)
		}
		return err
	})
	c.converge()
	type told struct {
		Status  int
		Type    string
		Outcome string
	}
	wantTold := func(what string, a *answer, want told) {
		t.Helper()
		var got told
		if err := json.Unmarshal(a.body, &got); err != nil || got != want {
			t.Errorf("%s is answered with %v, want %+v", what, a, want)
		}
	}
	unknown := told{504, "https://confman/errors/outcome-unknown", "unknown"}
	refused := told{503, "https://confman/errors/unavailable", "not-applied"}

	// Forwarded to a leader that stands still with the request in its socket.
	writes := []struct{ method, path, body string }{
		{"PUT", keyPath("app", "k"), `{"value":"given up"}`},
		{"PUT", keyPath("app", "new"), `{"value":"given up"}`},
		{"DELETE", keyPath("app", "d"), ""},
		{"PATCH", "/api/v1/config/app", `{"k":"given up","d":null}`},
		{"PUT", "/api/v1/namespaces/app", `{"description":"given up"}`},
		{"PUT", "/api/v1/namespaces/other", `{"description":"given up"}`},
	}
	id := func(i int) string { return fmt.Sprintf("given-up-%d", i) }
	_, before, err := leader.status()
	if err != nil {
		t.Fatal(err)
	}
	var sent []*pending
	for range writes {
		sent = append(sent, newPending(t, f))
	}
	// A new connection would end at the handshake. So that there is one for each write, as many
	// are made at once.
	road := roads.of(f, leader)
	already := road.holds(replies)
	road.hold(replies, true)
	for _, p := range sent {
		if err := p.send("PUT", keyPath("app", "k"), `{"value":"there"}`); err != nil {
			t.Fatal(err)
		}
	}
	until(t, 5*time.Second, func() error {
		if got := road.holds(replies) - already; got < len(sent) {
			return fmt.Errorf("%d of %d are on their way", got, len(sent))
		}
		return nil
	})
	road.hold(replies, false)
	for _, p := range sent {
		if _, err := p.answer(); err != nil {
			t.Fatal(err)
		}
	}
	leader.pause()
	stoodStill(t, leader)
	start := time.Now()
	for i, w := range writes {
		if err := sent[i].send(w.method, w.path, w.body, "X-Correlation-Id", id(i)); err != nil {
			t.Fatal(err)
		}
	}
	for i, w := range writes {
		a, err := sent[i].answer()
		if err != nil {
			t.Fatal(err)
		}
		wantTold(fmt.Sprintf("%s %s, given up", w.method, w.path), a, unknown)
	}
	if took := time.Since(start); took < timeout || took > timeout+limit(time.Second) {
		t.Errorf("they were given up after %v, RequestTimeout is %v", took, timeout)
	}
	leader.resume()
	c.ready()
	if _, st, err := leader.status(); err != nil || st.Role != "leader" || st.Term != before.Term {
		t.Logf("%s was replaced while it stood still: %+v, %v; less is shown", leader.id, st, err)
	}
	for i := range writes {
		for _, n := range c.nodes {
			if events := settled(t, n, "app", id(i)); len(events) > 0 {
				t.Errorf("%s was given up and is in the trail: %+v", id(i), events)
			}
		}
	}

	// A body that comes when the time is over.
	leader = c.leader()
	slow := newPending(t, leader)
	body := `{"value":"too late"}`
	if _, err := fmt.Fprintf(slow.conn, "PUT %s HTTP/1.1\r\nHost: test\r\nX-API-Key: %s\r\nX-Correlation-Id: too-late\r\nContent-Length: %d\r\n\r\n",
		keyPath("app", "k"), adminKey, len(body)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(timeout + 100*time.Millisecond) // the time is what this is about
	if _, err := io.WriteString(slow.conn, body); err != nil {
		t.Fatal(err)
	}
	a, err := slow.answer()
	if err != nil {
		t.Fatal(err)
	}
	wantTold("a write whose body came too late", a, refused)

	// Proposed in time, and confirmed by no majority yet.
	others := slices.DeleteFunc(slices.Clone(c.nodes), func(n *node) bool { return n == leader })
	for _, n := range others {
		roads.of(leader, n).hold(calls, true)
	}
	open := newPending(t, leader)
	if err := open.send("PUT", keyPath("app", "k"), `{"value":"in the log"}`, "X-Correlation-Id", "in-the-log"); err != nil {
		t.Fatal(err)
	}
	if a, err = open.answer(); err != nil {
		t.Fatal(err)
	}
	wantTold("a write that no majority confirms", a, unknown)
	var settling []*pending
	for _, n := range c.nodes {
		p := newPending(t, n)
		if err := p.send("GET", "/api/v1/audit/app?consistent&correlationId=in-the-log", ""); err != nil {
			t.Fatal(err)
		}
		settling = append(settling, p)
	}
	for _, n := range others {
		roads.of(leader, n).hold(calls, false)
	}
	for i, p := range settling {
		a, err := p.answer()
		if err != nil {
			t.Fatal(err)
		}
		if a.status == http.StatusOK && !strings.Contains(string(a.body), `"correlationId":"in-the-log"`) || a.status != http.StatusOK && a.slug() != "no-leader" && a.slug() != "behind" {
			t.Errorf("%s settles a write that is in the log with %v", c.nodes[i].id, a)
		}
	}
	c.ready()
	found := settled(t, c.leader(), "app", "in-the-log")
	for _, n := range c.nodes {
		if got := settled(t, n, "app", "in-the-log"); len(got) != len(found) {
			t.Errorf("%s settles a write with %d events, another with %d", n.id, len(got), len(found))
		}
	}
	t.Logf("the write without a majority was made in %d cases of 1", len(found))

	// Much later nothing has changed its mind.
	last := c.leader().put(t, "app", "k", "last")
	c.converge()
	for _, e := range c.nodes[0].trail(t, "") {
		if strings.HasPrefix(e.CorrelationID, "given-up") || e.CorrelationID == "too-late" {
			t.Errorf("given up, and in the trail at the end: %s", e.raw)
		}
	}
	if want := uint64(2 + len(found)); last.Version != want {
		t.Errorf("version %d at the end, want %d", last.Version, want)
	}
}

// TestDeadlineHeader: who sends Confman-Deadline can shorten the time of his request, and never
// has more of it than RequestTimeout.
func TestDeadlineHeader(t *testing.T) {
	t.Parallel()
	s := newReader(t, newWriter(t, t.TempDir()))
	timeout := s.cfg.requestTimeout()
	at := func(in time.Duration) string { return strconv.FormatInt(time.Now().Add(in).UnixNano(), 10) }
	for _, m := range []struct {
		name                string
		forwarded, deadline string // headers; none if empty
		believed            bool
	}{
		{"no header", "", "", false},
		{"passed on, no deadline", "node2", "", false},
		{"an earlier one", "node2", at(timeout / 2), true},
		{"one that is over", "node2", at(-time.Hour), true},
		{"a later one", "node2", at(time.Hour), false},
		{"no number", "node2", "soon", false},
		{"not passed on", "", at(timeout / 2), false},
	} {
		r := httptest.NewRequest("PUT", keyPath("app", "k"), nil)
		for name, v := range map[string]string{"Confman-Forwarded": m.forwarded, "Confman-Deadline": m.deadline} {
			if v != "" {
				r.Header.Set(name, v)
			}
		}
		c := s.newCall(httptest.NewRecorder(), r)
		want := c.start.Add(timeout).UnixNano()
		if m.believed {
			want, _ = strconv.ParseInt(m.deadline, 10, 64) // made by at
		}
		if got := c.deadline().UnixNano(); got != want {
			t.Errorf("%s: the deadline is %v off", m.name, time.Duration(got-want))
		}
	}
}

// TestLeaderDeadline: a write that is passed on says by the leader's clock when its sender gives
// it up, however far apart the clocks of the two are.
func TestLeaderDeadline(t *testing.T) {
	t.Parallel()
	s := newReader(t, newWriter(t, t.TempDir()))
	passed := make(chan string, 1)
	leader := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		passed <- r.Header.Get("Confman-Deadline")
		w.WriteHeader(http.StatusConflict) // of a success this node would wait for the revision
	}))
	defer leader.Close()
	s.node.forwards.Store(&http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", leader.Listener.Addr().String())
	}})
	for _, ahead := range []time.Duration{time.Hour, -time.Hour} {
		here := time.Now()
		there := here.Add(ahead)
		s.node.leaderClock.Store(&clockReading{"node2", there.UnixNano(), here})
		c := s.newCall(httptest.NewRecorder(), httptest.NewRequest("PUT", keyPath("app", "k"), strings.NewReader(`{"value":"v"}`)))
		if err := s.forward(c, "node2"); err != nil {
			t.Fatal(err)
		}
		want := there.Add(c.start.Sub(here) + s.cfg.requestTimeout()).UnixNano()
		text := <-passed
		if got, err := strconv.ParseInt(text, 10, 64); err != nil || got != want {
			t.Errorf("of a leader whose clock is %v ahead: the deadline %q is %v off", ahead, text, time.Duration(got-want))
		}
	}
	// What another node's clock shows says nothing of this leader's.
	if nanos, err := s.node.leaderDeadline(t.Context(), "node3", time.Now()); !errors.Is(err, errNoLeader) {
		t.Errorf("of a leader whose clock is not known: %d, %v", nanos, err)
	}
}

// TestNeverSent: a forwarded write whose time is over before it goes out was not applied, and the
// answer says so; the same of a proposal that waits too long for its turn.
func TestNeverSent(t *testing.T) {
	t.Parallel()
	const timeout = 500 * time.Millisecond
	c := startCluster(t, 3, steady, with("Cluster", "RequestTimeout", timeout.Milliseconds()), with("Cluster", "Forward", true))
	f := c.followers()[0]
	c.leader().put(t, "app", "there", "v")
	c.converge()
	p := newPending(t, f)
	body := `{"value":"too late"}`
	fmt.Fprintf(p.conn, "PUT %s HTTP/1.1\r\nHost: test\r\nX-API-Key: %s\r\nContent-Length: %d\r\n\r\n", keyPath("app", "k"), adminKey, len(body))
	time.Sleep(timeout + 100*time.Millisecond) // the time is what this is about
	io.WriteString(p.conn, body)
	a, err := p.answer()
	if err != nil || a.status != http.StatusServiceUnavailable || a.slug() != "unavailable" || !strings.Contains(string(a.body), `"outcome":"not-applied"`) {
		t.Errorf("a write that was not sent on in time: %v, %v, want 503 unavailable, not-applied", a, err)
	}

	n := &raftNode{proposals: make(chan *proposal, 2)}
	late := &proposal{cmd: &command{Until: time.Now().UnixNano() - 1}, done: make(chan outcome, 1)}
	good := &proposal{cmd: &command{Until: time.Now().Add(time.Minute).UnixNano()}, done: make(chan outcome, 1)}
	n.ctx = t.Context()
	n.proposals <- late
	n.proposals <- good
	batch, _, err := n.gather()
	if err != nil || len(batch) != 1 || batch[0] != good {
		t.Errorf("gathered %v, %v, want the one in time", batch, err)
	}
	if o := <-late.done; !errors.Is(o.err, errUnavailable) || late.state.Load() != abandoned {
		t.Errorf("a late proposal: %v, state %d", o.err, late.state.Load())
	}
}
