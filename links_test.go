package main

// The roads between nodes, which tests can block. Each node has a configuration
// file of its own, in which the others' Raft ports are those of proxies.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// weaker begins the names of configuration files whose nodes take VerifyLeader for
// enough, see init.
const weaker = "verifyleader-"

// init makes a node of this binary serve ?consistent the way that traps.md warns of,
// if the name of its configuration file says so: a test must be able to fail.
func init() {
	if os.Getenv("CONFMAN_NODE") == "" {
		return
	}
	for _, arg := range os.Args {
		if strings.HasPrefix(filepath.Base(arg), weaker) {
			confirmLeadership = func(n *raftNode, _ uint64) error { return n.raft.Load().VerifyLeader().Error() }
		}
	}
}

// A link is the road on which one node calls another's Raft port. What it holds back
// is not lost, as with a network that is cut and mended: it arrives late, in order.
// It knows calls apart only where the nodes talk in plain text.
type link struct {
	ln net.Listener

	mu      sync.Mutex // protects the rest
	target  string
	change  *sync.Cond        // rung when one of the rules changes
	held    [2]bool           // by direction: calls and replies
	most    int               // calls with more bytes at once are held too; 0 for any
	stops   func([]byte) bool // calls that it picks are held too; nil for none
	after   []byte            // the call that holds this is the last that goes by; nil for none
	waiting [2]int            // how much is held right now, in pieces
	asks    int               // questions of nodes to each other that have come by
	open    map[net.Conn]bool // the connections on it, at the calling end
	over    bool              // the test has ended
}

// The directions of a link.
const (
	calls = iota
	replies
)

// newLink makes a link that leads nowhere yet.
func newLink(tb testing.TB) *link {
	tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	l := &link{ln: ln, open: map[net.Conn]bool{}}
	l.change = sync.NewCond(&l.mu)
	ctx, end := context.WithCancel(context.Background())
	var pumps sync.WaitGroup
	pumps.Go(func() {
		for {
			from, err := ln.Accept()
			if err != nil {
				return
			}
			pumps.Go(func() { l.carry(ctx, from) })
		}
	})
	tb.Cleanup(func() {
		l.set(func() { l.over = true })
		end()
		ln.Close()
		pumps.Wait()
	})
	return l
}

// set changes the rules.
func (l *link) set(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	l.change.Broadcast()
}

// carry serves one connection until either end closes it, or ctx ends.
func (l *link) carry(ctx context.Context, from net.Conn) {
	defer from.Close()
	var target string
	l.set(func() { target, l.open[from] = l.target, true })
	defer l.set(func() { delete(l.open, from) })
	to, err := net.DialTimeout("tcp", target, time.Second)
	if err != nil {
		return // the node is down, and so is the road
	}
	defer to.Close()
	defer context.AfterFunc(ctx, func() { from.Close(); to.Close() })()
	var pumps sync.WaitGroup
	pumps.Go(func() { l.pump(from, to, calls) })
	pumps.Go(func() { l.pump(to, from, replies) })
	pumps.Wait()
}

// pump passes on what one end sends, one read at a time.
func (l *link) pump(from, to net.Conn, way int) {
	defer from.Close() // ends the other pump
	defer to.Close()
	// A message of Raft is flushed at once, so a big one shows in its first piece.
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 && !l.pass(buf[:n], way) {
			return
		}
		if n > 0 {
			to.SetWriteDeadline(time.Now().Add(10 * time.Second))
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// pass waits until a piece may go on; false if the test is over.
func (l *link) pass(piece []byte, way int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if way == calls {
		l.asks += bytes.Count(piece, []byte("GET /"))
	}
	l.waiting[way]++
	defer func() { l.waiting[way]-- }()
	for !l.over && (l.held[way] || way == calls && (l.most > 0 && len(piece) > l.most || l.stops != nil && l.stops(piece))) {
		l.change.Wait()
	}
	if way == calls && l.after != nil && bytes.Contains(piece, l.after) {
		l.held[calls] = true
	}
	return !l.over
}

// hasEntries reports whether a call is an append that is no heartbeat: messages of Raft have the
// names of their members in them.
func hasEntries(call []byte) bool { return bytes.Contains(call, []byte("AppendedAt")) }

// hold holds back one direction, or lets it go.
func (l *link) hold(way int, held bool) { l.set(func() { l.held[way] = held }) }

// snap breaks every connection of the road, with what is held on it.
func (l *link) snap() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.open {
		c.Close()
	}
}

// holds returns how many pieces are held back in one direction.
func (l *link) holds(way int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.waiting[way]
}

// asked returns how many questions have come by.
func (l *link) asked() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.asks
}

// links are the roads of a cluster, by the ids of the calling and the called node.
type links map[[2]string]*link

// newLinked makes a cluster whose nodes reach each other by links alone. prefix
// begins the names of their configuration files. own changes the configuration of
// one node.
func newLinked(tb testing.TB, size int, prefix string, own func(id string, doc map[string]any), edits ...edit) (*cluster, links) {
	tb.Helper()
	// They come first so that they are there for as long as the nodes are.
	var pool []*link
	for range size * (size - 1) {
		pool = append(pool, newLink(tb))
	}
	c := newCluster(tb, size, edits...)
	text, err := os.ReadFile(c.config)
	if err != nil {
		tb.Fatal(err)
	}
	roads := links{}
	for _, n := range c.nodes {
		var doc map[string]any
		if err := json.Unmarshal(text, &doc); err != nil {
			tb.Fatal(err)
		}
		for i, m := range doc["Cluster"].(map[string]any)["Nodes"].([]any) {
			to := c.nodes[i]
			if to == n {
				continue
			}
			l := pool[0]
			pool = pool[1:]
			l.set(func() { l.target = to.raft })
			roads[[2]string{n.id, to.id}] = l
			m.(map[string]any)["RaftPort"] = l.ln.Addr().(*net.TCPAddr).Port
		}
		if own != nil {
			own(n.id, doc)
		}
		b, err := json.Marshal(doc)
		if err != nil {
			tb.Fatal(err)
		}
		path := filepath.Join(c.dir, prefix+n.id+".json")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			tb.Fatal(err)
		}
		n.args = []string{"-config", path, "-node", n.id}
	}
	return c, roads
}

// of returns the link from one node to another.
func (ls links) of(from, to *node) *link { return ls[[2]string{from.id, to.id}] }

// cut holds back all that n and the others say to each other, or lets it go.
func (ls links) cut(n *node, held bool) {
	for ids, l := range ls {
		if ids[0] == n.id || ids[1] == n.id {
			l.set(func() { l.held = [2]bool{held, held} })
		}
	}
}

// TestLink: a link holds each direction on its own, big calls, picked ones and those behind a
// certain one, and loses nothing.
func TestLink(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() { // answers each piece with its length
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 1<<10)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					fmt.Fprintf(c, "%4d", n)
				}
			}()
		}
	}()
	l := newLink(t)
	l.set(func() { l.target = ln.Addr().String() })
	conn, err := net.Dial("tcp", l.ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	say := func(n int) {
		if _, err := conn.Write(bytes.Repeat([]byte("x"), n)); err != nil {
			t.Fatal(err)
		}
	}
	hear := func(want int) {
		t.Helper()
		b := make([]byte, 4)
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Read(b); err != nil || string(b) != fmt.Sprintf("%4d", want) {
			t.Fatalf("heard %q, %v, want %d", b, err, want)
		}
	}
	silent := func(way int) {
		t.Helper()
		until(t, 5*time.Second, func() error {
			if l.holds(way) != 1 {
				return fmt.Errorf("%d pieces are held", l.holds(way))
			}
			return nil
		})
		conn.SetReadDeadline(time.Now().Add(time.Millisecond))
		if n, err := conn.Read(make([]byte, 4)); err == nil {
			t.Fatalf("heard %d bytes", n)
		}
	}
	say(3)
	hear(3)
	for _, way := range []int{calls, replies} {
		l.hold(way, true)
		say(4)
		silent(way)
		l.hold(way, false)
		hear(4)
	}
	l.set(func() { l.most = 5 })
	say(5)
	hear(5)
	say(6)
	silent(calls)
	l.set(func() { l.most = 0 })
	hear(6)
	l.set(func() { l.stops = func(call []byte) bool { return len(call) == 7 } })
	say(8)
	hear(8)
	say(7)
	silent(calls)
	l.set(func() { l.stops = nil })
	hear(7)
	l.set(func() { l.after = []byte("xxxxxxxxx") })
	say(8)
	hear(8)
	say(9)
	hear(9)
	say(8)
	silent(calls)
	l.set(func() { l.after, l.held[calls] = nil, false })
	hear(8)
}
