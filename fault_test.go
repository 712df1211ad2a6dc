package main

// What happens to nodes: they are killed, paused, restarted one by one, wiped and
// interrupted. Whatever it is, nothing acknowledged is lost or doubled, and the nodes are
// equal again within 15 s. Lengths and moments are drawn from a seed that the test prints;
// CONFMAN_SEED=N draws them again.

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// seeded returns the source of what a test leaves to chance.
func seeded(tb testing.TB) *rand.Rand {
	tb.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("CONFMAN_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			tb.Fatalf("CONFMAN_SEED: %v", err)
		}
	}
	tb.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// between draws a length of time.
func between(r *rand.Rand, low, high time.Duration) time.Duration {
	return low + time.Duration(r.Int64N(int64(high-low)))
}

// prove ends a workload and checks what its clients saw against the trail, and the trail
// on every node.
func prove(load *workload) {
	load.c.tb.Helper()
	load.check()
	verify(load.c)
}

// verify waits until all live nodes are equal and has each one check its own trail, whole.
func verify(c *cluster) {
	c.tb.Helper()
	c.ready()
	st := c.converge()
	for _, n := range c.live() {
		if v := n.verify(c.tb); !v.OK || v.Hash != st.Hash {
			c.tb.Errorf("%s says of its trail %+v, the last hash is %s", n.id, v, st.Hash)
		}
	}
}

// A verdict is the answer of /api/v1/verify.
type verdict struct {
	OK                bool
	Events            uint64
	First, Last, Hash string
	Event, Detail     string
}

// verify asks for a check of the trail on this node.
func (n *node) verify(tb testing.TB) (v verdict) {
	tb.Helper()
	a := n.ask(tb, "GET", "/api/v1/verify?stale", "")
	if err := json.Unmarshal(a.body, &v); err != nil || a.status != http.StatusOK {
		tb.Fatalf("GET /api/v1/verify at %s: %v (%v)", n.id, a, err)
	}
	return v
}

// elected waits until a live node leads, which may take 5 s from since on.
func elected(tb testing.TB, c *cluster, since time.Time) (leader *node) {
	tb.Helper()
	until(tb, limit(5*time.Second)-time.Since(since), func() error {
		for _, n := range c.live() {
			if code, st, err := n.status(); err == nil && code == http.StatusOK && st.Role == "leader" {
				leader = n
				return nil
			}
		}
		return errors.New("nobody leads")
	})
	tb.Logf("%s leads after %v", leader.id, time.Since(since).Round(time.Millisecond))
	return leader
}

// writable waits until one of nodes acknowledges a write, which may take d from since on.
func writable(tb testing.TB, nodes []*node, since time.Time, d time.Duration, what string) {
	tb.Helper()
	took := firstWrite(tb, nodes, strconv.FormatInt(since.UnixNano(), 10)).Sub(since)
	if took >= limit(d) {
		tb.Errorf("%s: the first write is acknowledged after %v, ordered is under %v", what, took, d)
	}
	tb.Logf("%s: the first write is acknowledged after %v", what, took.Round(time.Millisecond))
}

// TestKills kills the leader, and then all three within 50 ms, under load.
func TestKills(t *testing.T) {
	t.Parallel()
	r := seeded(t)
	c := startCluster(t, 3)
	load := startLoad(c, 16)
	for range rounds(1, 10) {
		load.more(limit(10*time.Second), 50+r.IntN(200))
		old := c.leader()
		start := time.Now()
		old.kill()
		elected(t, c, start)
		load.more(limit(5*time.Second), 1+r.IntN(100))
		old.start()
		c.ready()

		load.more(limit(10*time.Second), 50+r.IntN(200))
		var kills sync.WaitGroup
		for _, n := range c.nodes {
			after := between(r, 0, 50*time.Millisecond)
			kills.Go(func() {
				time.Sleep(after) // the moment of the fault
				n.kill()
			})
		}
		kills.Wait()
		start = time.Now()
		for _, n := range c.nodes {
			n.start()
		}
		elected(t, c, start)
		c.ready()
	}
	prove(load)
}

// TestPauses stops the leader for 2 to 6 s, and then both followers, as stalled machines.
func TestPauses(t *testing.T) {
	t.Parallel()
	r := seeded(t)
	c := startCluster(t, 3, with("Cluster", "RequestTimeout", 2000))
	load := startLoad(c, 16)
	for range rounds(1, 10) {
		load.more(limit(10*time.Second), 50+r.IntN(100))
		old := c.leader()
		start := time.Now()
		old.pause()
		writable(t, c.live(), start, 4*time.Second, "leader paused")
		time.Sleep(between(r, 2*time.Second, 6*time.Second) - time.Since(start)) // the fault's length
		old.resume()
		c.ready()

		load.more(limit(10*time.Second), 50+r.IntN(100))
		others := c.followers()
		for _, n := range others {
			n.pause()
		}
		time.Sleep(between(r, 2*time.Second, 6*time.Second)) // the fault's length
		start = time.Now()
		for _, n := range others {
			n.resume()
		}
		writable(t, c.nodes, start, 4*time.Second, "followers resumed")
		c.ready()
	}
	prove(load)
}

// A gap is the longest time in which no client had a write acknowledged.
type gap struct {
	mu      sync.Mutex // protects the rest
	last    time.Time
	longest time.Duration
}

// ack notes an acknowledgement.
func (g *gap) ack() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.longest, g.last = max(g.longest, time.Since(g.last)), time.Now()
}

// reset returns the gap, up to now, and begins anew.
func (g *gap) reset() (longest time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	longest, g.longest = max(g.longest, time.Since(g.last)), 0
	return longest
}

// startSteady sets clients to work that behave as a program should: each keeps to the node
// that served it last, goes where a redirect points, and repeats what was refused.
func startSteady(c *cluster, clients int, g *gap) *workload {
	l := &workload{c: c, quit: make(chan struct{}), acked: make(map[string]uint64), unknown: make(map[string]doubt)}
	c.tb.Cleanup(l.end)
	g.last = time.Now()
	for client := range clients {
		l.wg.Go(func() {
			base := c.nodes[client%len(c.nodes)].url
			for i := 0; ; i++ {
				id, path := fmt.Sprintf("s%d-%06d", client, i), keyPath("load", fmt.Sprintf("s%d/k%d", client, i%5))
				for again := true; again; {
					select {
					case <-l.quit:
						return
					default:
					}
					from := time.Now()
					a, err := do("PUT", base+path, adminKey, `{"value":"`+id+`"}`, "X-Correlation-Id", id)
					l.mu.Lock()
					again = l.note(id, from, a, err)
					l.mu.Unlock()
					switch {
					case !again:
						g.ack()
					case err == nil && a.status == http.StatusTemporaryRedirect:
						base = strings.TrimSuffix(a.header.Get("Location"), path)
					default:
						base = c.nodes[rand.IntN(len(c.nodes))].url
						time.Sleep(10 * time.Millisecond) // the pace of the question
					}
				}
			}
		})
	}
	return l
}

// TestRollingRestart stops and starts the nodes one after another, two rounds, and no
// client that repeats what was refused notices more than a short wait.
func TestRollingRestart(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	var g gap
	load := startSteady(c, 8, &g)
	load.more(limit(10*time.Second), 100)
	for range rounds(2, 10) {
		for _, n := range c.nodes {
			g.reset()
			role := "follower"
			if n == c.leader() {
				role = "leader"
			}
			n.stop()
			n.start()
			c.ready()
			load.more(limit(5*time.Second), 20)
			longest := g.reset()
			t.Logf("%s restarted, %s: no acknowledgement for %v", n.id, role, longest.Round(time.Millisecond))
			if longest >= limit(time.Second) {
				t.Errorf("no acknowledgement for %v while %s restarted, ordered is under 1s", longest, n.id)
			}
		}
	}
	prove(load)
	for id, d := range load.unknown {
		t.Errorf("a rolling restart left %s in doubt: %+v", id, d)
	}
}

// TestCounter counts with If-Match while the leader is killed again and again: no increment
// is lost, none is made twice.
func TestCounter(t *testing.T) {
	t.Parallel()
	total, kills := int64(rounds(100, 1000)), int64(rounds(3, 10))
	const timeout = 1000 // of a request, ms: an unknown outcome is settled one later
	c := startCluster(t, 3, with("Cluster", "RequestTimeout", timeout))
	c.nodes[0].put(t, "count", "n", "0")

	var (
		taken, done, allowed atomic.Int64 // tickets for one increment each
		unknown, applied     atomic.Int64 // outcomes that were settled
		clients              sync.WaitGroup
		quit                 = make(chan struct{})
	)
	end := sync.OnceFunc(func() { close(quit); clients.Wait() })
	t.Cleanup(end)
	any := func() string { return c.nodes[rand.IntN(len(c.nodes))].url }
	// add makes one attempt; made says that it is in the count.
	add := func(id string) (made bool) {
		a, err := doWith(following, "GET", any()+keyPath("count", "n")+"?consistent", adminKey, "")
		if err != nil || a.status != http.StatusOK {
			return false
		}
		var e entryDoc
		if err := json.Unmarshal(a.body, &e); err != nil {
			t.Errorf("%v in %v", err, a)
			return false
		}
		n, err := strconv.Atoi(e.Value)
		if err != nil {
			t.Errorf("the counter is %q", e.Value)
			return false
		}
		a, err = doWith(following, "PUT", any()+keyPath("count", "n"), adminKey, fmt.Sprintf(`{"value":"%d"}`, n+1),
			"If-Match", a.header.Get("ETag"), "X-Correlation-Id", id)
		switch {
		case err == nil && a.status == http.StatusOK:
			return true
		case err == nil && (a.status == http.StatusPreconditionFailed || a.status == http.StatusServiceUnavailable), errors.Is(err, syscall.ECONNREFUSED):
			return false
		case err == nil && a.status != http.StatusGatewayTimeout:
			t.Errorf("increment: %v", a)
			return false
		}
		// Nobody knows. One RequestTimeout later the trail does.
		unknown.Add(1)
		time.Sleep(timeout * time.Millisecond) // the contract's wait
		for {
			var page struct{ Items []json.RawMessage }
			a, err := doWith(following, "GET", any()+"/api/v1/audit/count?consistent&correlationId="+id, adminKey, "")
			if err == nil && a.status == http.StatusOK && json.Unmarshal(a.body, &page) == nil {
				applied.Add(int64(len(page.Items)))
				return len(page.Items) > 0
			}
			select {
			case <-quit:
				return false
			case <-time.After(20 * time.Millisecond): // the pace of the question
			}
		}
	}
	for client := range 8 {
		clients.Go(func() {
			attempt := 0
			for ticket := taken.Add(1); ticket <= total; ticket = taken.Add(1) {
				for made := false; !made; {
					select {
					case <-quit:
						return
					default:
					}
					if ticket > allowed.Load() {
						time.Sleep(time.Millisecond) // the pace of the question
						continue
					}
					attempt++
					made = add(fmt.Sprintf("c%d-%d", client, attempt))
				}
				done.Add(1)
			}
		})
	}
	reach := func(want int64) {
		t.Helper()
		until(t, limit(15*time.Second), func() error {
			if got := done.Load(); got < want {
				return fmt.Errorf("%d increments are made, want %d", got, want)
			}
			return nil
		})
	}
	for k := range kills { // a kill in the middle of each part
		allowed.Store(total * (k + 1) / kills)
		reach(total * (2*k + 1) / kills / 2)
		old := c.leader()
		start := time.Now()
		old.kill()
		elected(t, c, start)
		old.start()
		c.ready()
	}
	reach(total)
	end()
	c.converge()
	e := c.leader().get(t, "count", "n")
	t.Logf("%d unknown outcomes, %d of them applied", unknown.Load(), applied.Load())
	if e.Value != fmt.Sprint(total) || e.Version != uint64(total)+1 {
		t.Errorf("after %d increments the counter is %+v", total, e)
	}
	verify(c)
}

// TestWipedVoter: a node that comes back empty must not vote for a laggard. 100 writes are on
// A and B only, B is wiped, A is down: B and C are a majority, and nobody may lead.
func TestWipedVoter(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	c.nodes[0].put(t, "wiped", "before", "x")
	c.converge()
	a := c.leader()
	followers := c.followers()
	b, laggard := followers[0], followers[1]
	laggard.pause()
	for i := range 100 {
		a.put(t, "wiped", fmt.Sprintf("k%d", i), fmt.Sprint(i))
	}
	b.kill()
	if err := os.RemoveAll(b.data); err != nil {
		t.Fatal(err)
	}
	a.kill()
	laggard.resume()
	b.start()
	until(t, 5*time.Second, func() error {
		_, st, err := b.status()
		if err == nil && !strings.Contains(st.Reason, "empty") {
			err = fmt.Errorf("%s, which is empty, says %+v", b.id, st)
		}
		return err
	})
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) { // the fault's length
		for _, n := range []*node{b, laggard} {
			if _, st, err := n.status(); err == nil && (st.Role == "leader" || st.LeaderID != "" && st.LeaderID != a.id) {
				t.Fatalf("without %s, %s says %+v", a.id, n.id, st)
			}
		}
	}
	start := time.Now()
	a.start()
	c.ready()
	c.converge()
	t.Logf("all ready and equal %v after %s was back", time.Since(start).Round(time.Millisecond), a.id)
	for _, n := range c.nodes {
		for i := range 100 {
			if e := n.get(t, "wiped", fmt.Sprintf("k%d", i)); e.Value != fmt.Sprint(i) {
				t.Errorf("%s shows %+v", n.id, e)
			}
		}
	}
	until(t, limit(15*time.Second), func() error {
		_, st, err := b.status()
		if err == nil && st.Role == "nonvoter" {
			err = fmt.Errorf("%s has no vote yet: %+v", b.id, st)
		}
		return err
	})
	t.Logf("%s votes again after %v", b.id, time.Since(start).Round(time.Millisecond))
	verify(c)
	a.kill() // its vote is worth something: without it there is no majority
	writable(t, []*node{b, laggard}, time.Now(), 5*time.Second, "with the vote of the node that was wiped")
	a.start()
	c.ready()
}

// TestInstallKilled: a follower is 20,000 writes behind and is killed while the snapshot
// arrives. Started again, it is caught up in under 15 s. Where the leader's log still holds what
// the follower lacks no snapshot is sent, and it is killed in the middle of the log; with
// CONFMAN_LONG the leader is made to cut its log.
func TestInstallKilled(t *testing.T) {
	t.Parallel()
	behind := 20_000
	if raced {
		behind = 4_000
	}
	c := startCluster(t, 3)
	c.nodes[0].put(t, "bench", "before", "x")
	base := c.converge().Revision
	leader, f := c.leader(), c.followers()[0]
	f.pause() // not killed: raft asks ever more seldom whether a dead node is back
	job := func() func(int) []byte {
		r := newPut()
		return func(op int) []byte { return r.with(op%5000, op) }
	}
	newFleet(t, leader.api, 64).drive(t, behind, job)
	if rounds(0, 1) > 0 {
		// Writes that wait together share an entry. Few clients make many entries.
		few := newFleet(t, leader.api, 3)
		for cut := 0; cut < 2; { // at the second snapshot the first one's entries go
			few.drive(t, 5000, job)
			cut = strings.Count(leader.logged(), "snapshot written")
		}
	}
	f.kill()
	snapshot := false
	for range rounds(1, 5) {
		f.start()
		for pace := time.NewTicker(time.Millisecond); ; <-pace.C {
			if part, err := filepath.Glob(filepath.Join(f.data, "snapshots", "*.tmp", "state.bin")); err != nil {
				t.Fatal(err)
			} else if len(part) > 0 {
				snapshot = true
				break
			}
			if at, err := revision(f); err == nil && at > base {
				break
			}
			if !f.running() {
				t.Fatalf("%s has ended: %v", f.id, f.err)
			}
		}
		f.kill()
	}
	if snapshot {
		t.Logf("killed while a snapshot arrived, %d are whole", installed(t, f))
	} else if t.Log("killed while the log was applied: no snapshot was sent"); rounds(0, 1) > 0 {
		t.Errorf("%s was sent no snapshot", f.id)
	}
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
	t.Logf("caught up after %v", time.Since(start).Round(time.Millisecond))
	verify(c)
}

// installed returns how many whole snapshots n has. Raft tries the directory out with names of
// its own.
func installed(tb testing.TB, n *node) (whole int) {
	tb.Helper()
	files, err := filepath.Glob(filepath.Join(n.data, "snapshots", "*", "state.bin"))
	if err != nil {
		tb.Fatal(err)
	}
	for _, f := range files {
		if !strings.HasSuffix(filepath.Dir(f), ".tmp") {
			whole++
		}
	}
	return whole
}

// TestWipedMajority: where most nodes have lost their data, those that are left do not lead and the
// empty ones do not begin anew; copied to the others, the data that is left is served again.
func TestWipedMajority(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	was := c.nodes[0].put(t, "app", "k", "v")
	c.converge()
	left, lost := c.nodes[0], c.nodes[1:]
	for _, n := range c.nodes {
		n.stop()
	}
	for _, n := range lost {
		if err := os.RemoveAll(n.data); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range c.nodes {
		n.start()
	}
	for _, n := range lost {
		until(t, limit(10*time.Second), func() error {
			code, st, err := n.status()
			if err == nil && (code != http.StatusServiceUnavailable || !strings.Contains(st.Reason, "node "+left.id+" has data")) {
				err = fmt.Errorf("%s says %d %+v", n.id, code, st)
			}
			return err
		})
	}
	if a, err := do("PUT", left.url+keyPath("app", "k"), adminKey, `{"value":"w"}`); err != nil || a.status != http.StatusServiceUnavailable {
		t.Errorf("a write at the node that is left: %v, %v", a, err)
	}
	for _, n := range c.nodes {
		n.stop()
	}
	for _, n := range lost {
		if err := errors.Join(os.RemoveAll(n.data), os.CopyFS(n.data, os.DirFS(left.data)), filepath.WalkDir(n.data, private)); err != nil {
			t.Fatal(err)
		}
	}
	c.start()
	for _, n := range c.nodes {
		if got := n.get(t, "app", "k"); got != was {
			t.Errorf("%s shows %+v, want %+v", n.id, got, was)
		}
	}
	c.leader().put(t, "app", "k", "w")
	lost[0].kill()
	c.leader().put(t, "app", "k", "x")
	lost[0].start()
	c.ready()
}

// private gives a file or directory the mode that cp -a would have kept.
func private(path string, d fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	if d.IsDir() {
		return os.Chmod(path, 0o700)
	}
	return os.Chmod(path, 0o600)
}

// newTransport makes one of raft's transports that answers whatever answer says.
func newTransport(t *testing.T, answer func(raft.RPC)) *raft.NetworkTransport {
	t.Helper()
	tr, err := raft.NewTCPTransportWithLogger("127.0.0.1:0", nil, maxPool, 5*time.Second, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.Close() })
	if answer != nil {
		go func() {
			for rpc := range tr.Consumer() {
				answer(rpc)
			}
		}()
	}
	return tr
}

// newGuarded puts the guard before a transport.
func newGuarded(t *testing.T, bare *raft.NetworkTransport, follows func(string, uint64) (uint64, bool)) *guardedTransport {
	quiet := slog.New(slog.DiscardHandler)
	return guardTransport(bare, newDisk(t.TempDir(), 1, quiet, nil), quiet, follows, func(raft.RPC) error { return nil })
}

// TestVotesAfterRestart: raft keeps connections to the other nodes, and those to a node that was
// started again since are broken. A vote asked for over one of them is asked for again.
func TestVotesAfterRestart(t *testing.T) {
	t.Parallel()
	to := newTransport(t, func(rpc raft.RPC) {
		switch rpc.Command.(type) {
		case *raft.RequestVoteRequest:
			rpc.Respond(&raft.RequestVoteResponse{Term: 7, Granted: true}, nil)
		case *raft.RequestPreVoteRequest:
			rpc.Respond(&raft.RequestPreVoteResponse{Term: 7, Granted: true}, nil)
		case *raft.TimeoutNowRequest:
			rpc.Respond(&raft.TimeoutNowResponse{}, nil)
		}
	})
	road := newLink(t)
	road.set(func() { road.target = string(to.LocalAddr()) })
	addr := raft.ServerAddress(road.ln.Addr().String())
	vote := func(tr raft.Transport) error {
		return tr.RequestVote("b", addr, &raft.RequestVoteRequest{Term: 7}, &raft.RequestVoteResponse{})
	}
	for name, call := range map[string]func(bare *raft.NetworkTransport, guarded *guardedTransport) error{
		"RequestVote": func(_ *raft.NetworkTransport, tr *guardedTransport) error { return vote(tr) },
		"RequestPreVote": func(_ *raft.NetworkTransport, tr *guardedTransport) error {
			return tr.RequestPreVote("b", addr, &raft.RequestPreVoteRequest{Term: 7}, &raft.RequestPreVoteResponse{})
		},
		"TimeoutNow": func(_ *raft.NetworkTransport, tr *guardedTransport) error {
			return tr.TimeoutNow("b", addr, &raft.TimeoutNowRequest{}, &raft.TimeoutNowResponse{})
		},
		"raft's own": func(tr *raft.NetworkTransport, _ *guardedTransport) error { return vote(tr) },
	} {
		bare := newTransport(t, nil)
		guarded := newGuarded(t, bare, nil)
		var wg sync.WaitGroup
		for range 2 * maxPool { // fills the pool
			wg.Go(func() {
				if err := call(bare, guarded); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			})
		}
		wg.Wait()
		road.snap()
		if err := call(bare, guarded); (err != nil) != (name == "raft's own") {
			t.Errorf("%s over connections that are broken: %v", name, err)
		}
	}
}

// TestHeartbeats: a heartbeat that could change raft's term or leader goes through raft's main loop
// and nowhere else; one that says nothing new is answered at once, whatever the loop does.
func TestHeartbeats(t *testing.T) {
	t.Parallel()
	to := newTransport(t, nil)
	guarded := newGuarded(t, to, func(leader string, term uint64) (uint64, bool) { return 42, leader == "a" && term == 7 })
	guarded.SetHeartbeatHandler(func(raft.RPC) { t.Error("raft's own handler is used") })
	from := newTransport(t, nil)
	beat := func(leader string, term uint64) (*raft.AppendEntriesResponse, error) {
		resp := &raft.AppendEntriesResponse{}
		req := &raft.AppendEntriesRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: 3, ID: []byte(leader), Addr: []byte(leader)}, Term: term}
		return resp, from.AppendEntries("to", to.LocalAddr(), req, resp)
	}
	for range 3 { // nobody reads the loop's channel
		if resp, err := beat("a", 7); err != nil || !resp.Success || resp.Term != 7 || resp.LastLog != 42 {
			t.Errorf("a heartbeat of the known leader: %+v, %v", resp, err)
		}
	}
	for _, m := range []struct {
		leader string
		term   uint64
	}{{"a", 8}, {"b", 8}, {"b", 7}, {"a", 6}} {
		answered := make(chan *raft.AppendEntriesResponse, 1)
		go func() {
			resp, err := beat(m.leader, m.term)
			if err != nil {
				t.Error(err)
			}
			answered <- resp
		}()
		rpc := <-guarded.Consumer()
		if req, ok := rpc.Command.(*raft.AppendEntriesRequest); !ok || req.Term != m.term || string(req.ID) != m.leader {
			t.Errorf("the loop is handed %+v, want the heartbeat of %s in term %d", rpc.Command, m.leader, m.term)
		}
		select {
		case resp := <-answered:
			t.Errorf("a heartbeat of %s in term %d is answered beside the loop: %+v", m.leader, m.term, resp)
		default:
		}
		rpc.Respond(&raft.AppendEntriesResponse{Term: 9}, nil)
		if resp := <-answered; resp.Term != 9 || resp.Success {
			t.Errorf("a heartbeat of %s in term %d: %+v", m.leader, m.term, resp)
		}
	}
}

// TestWritesToPausedLeader: what clients send to a leader that stands still, and that it reads when
// it goes on and hears of its successor at the same moment, does not make the nodes differ. raft
// let a heartbeat of a later term in beside its main loop, and the old leader put the write into its
// log under the term of the new one (hashicorp/raft issue 695).
func TestWritesToPausedLeader(t *testing.T) {
	t.Parallel()
	const late = 16
	c := startCluster(t, 3, quick)
	for round := range rounds(6, 300) {
		old := c.leader()
		var writes []*pending
		for range late {
			writes = append(writes, newPending(t, old))
		}
		old.pause()
		stoodStill(t, old)
		c.leader() // among the others
		for i, p := range writes {
			if err := p.send("PUT", keyPath("app", fmt.Sprintf("k%d", i)), fmt.Sprintf(`{"value":"%d late"}`, round)); err != nil {
				t.Fatal(err)
			}
		}
		old.resume()
		for _, p := range writes {
			if _, err := p.answer(); err != nil {
				t.Fatal(err)
			}
			p.conn.Close()
		}
		c.ready()
		c.leader().put(t, "app", "k", fmt.Sprint(round))
		c.converge()
	}
}
