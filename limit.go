package main

import (
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"syscall"
)

// maxValue is how many bytes a value may have at most, whatever Limits says: it may take six times its size
// in raft's log, and the trail keeps the old one beside it.
const maxValue = 4 << 20

// checkLimits finds the first mistake in Limits.
func (c *config) checkLimits() error {
	l := &c.Limits
	for _, m := range []struct {
		name             string
		value, low, most int
	}{
		{"MaxValueBytes", l.MaxValueBytes, 1, maxValue},
		{"MaxBodyBytes", l.MaxBodyBytes, 1, 8 << 20},
		{"MaxHeaderBytes", l.MaxHeaderBytes, 4 << 10, 1 << 20},
		{"MaxConnections", l.MaxConnections, 16, 1_000_000},
		{"MaxStreams", l.MaxStreams, 1, 1_000_000},
		{"MaxStreamsPerKey", l.MaxStreamsPerKey, 1, 1_000_000},
		{"AuthFailuresPerMinute", l.AuthFailuresPerMinute, 1, 1_000_000},
	} {
		if m.value < m.low || m.value > m.most {
			return fmt.Errorf("%s: %d must be %d to %d", "Limits."+m.name, m.value, m.low, m.most)
		}
	}
	if l.MaxBodyBytes < l.MaxValueBytes {
		return fmt.Errorf("Limits.MaxBodyBytes: %d is less than MaxValueBytes, %d", l.MaxBodyBytes, l.MaxValueBytes)
	}
	return nil
}

// A gate is the API's listener. It lets in as many connections as there is room for.
type gate struct {
	net.Listener
	room   chan struct{} // a token for each open connection
	closed chan struct{}
	once   sync.Once

	mu      sync.Mutex // guards the rest
	idle    map[net.Conn]struct{}
	waiting bool // someone who is to be let in; the next connection that falls idle makes room
}

// newGate lets in most connections at once.
func newGate(ln net.Listener, most int) *gate {
	return &gate{Listener: ln, room: make(chan struct{}, most), closed: make(chan struct{}), idle: map[net.Conn]struct{}{}}
}

// Accept implements net.Listener. Where there is no room, a connection on which nothing is asked is
// closed for the new one, as its client must expect at any time; if there is none, the new one waits,
// and those behind it in the kernel's queue.
func (g *gate) Accept() (net.Conn, error) {
	c, err := g.Listener.Accept()
	if err != nil {
		return nil, err
	}
	select {
	case g.room <- struct{}{}:
	default:
		g.makeRoom()
		select {
		case g.room <- struct{}{}:
		case <-g.closed:
			c.Close()
			return nil, net.ErrClosed
		}
		g.mu.Lock()
		g.waiting = false
		g.mu.Unlock()
	}
	return &guest{TCPConn: c.(*net.TCPConn), gate: g}, nil
}

// Close implements net.Listener. It may be called more than once.
func (g *gate) Close() error {
	g.once.Do(func() { close(g.closed) })
	return g.Listener.Close()
}

func (g *gate) makeRoom() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.idle {
		delete(g.idle, c)
		c.Close()
		return
	}
	g.waiting = true
}

// note is the server's ConnState.
func (g *gate) note(c net.Conn, state http.ConnState) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn() // closing it waits for nobody
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case state != http.StateIdle:
		delete(g.idle, c)
	case g.waiting:
		g.waiting = false
		c.Close()
	default:
		g.idle[c] = struct{}{}
	}
}

// A guest is a connection that was let in.
type guest struct {
	*net.TCPConn
	gate *gate
	left sync.Once
}

// Close implements net.Conn. It may be called more than once.
func (c *guest) Close() error {
	c.left.Do(func() { <-c.gate.room })
	return c.TCPConn.Close()
}

// ownFiles is how many open files are kept for what are no clients: the node's own, and the
// connections between nodes.
const ownFiles = 1024

// connections is how many connections there is room for: MaxConnections, or fewer where the process
// may not open as many files. Without files for itself a node leaves its cluster.
func (c *config) connections(log *slog.Logger) int {
	most := c.Limits.MaxConnections
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil || uint64(most+ownFiles) <= files.Cur {
		return most
	}
	most = max(int(files.Cur)-ownFiles, int(files.Cur)/2)
	log.Warn("fewer connections than Limits.MaxConnections: the process may open too few files", "connections", most, "files", files.Cur)
	return most
}

// A crowd counts what is held open for clients: streams, and answers to ?wait.
type crowd struct {
	mu      sync.Mutex // guards the rest
	all     int
	streams int // of all
	byKey   map[[sha256.Size]byte]int
}

// admit takes a place for a call; leave gives it back. The error is a 429.
func (s *server) admit(c *call) (leave func(), err error) {
	l, w := &s.cfg.Limits, &s.crowd
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.all >= l.MaxStreams:
		return nil, errTooMany.because("this node has %d streams and waits, Limits.MaxStreams; try another node", w.all)
	case w.byKey[c.who.key] >= l.MaxStreamsPerKey:
		return nil, errTooMany.because("this key has %d streams and waits on this node, Limits.MaxStreamsPerKey; try another node", w.byKey[c.who.key])
	}
	if w.byKey == nil {
		w.byKey = map[[sha256.Size]byte]int{}
	}
	key := c.who.key // identify may find another caller, or none, before the place is given back
	streams := 1
	if c.q.Has("wait") {
		streams = 0
	}
	w.all++
	w.streams += streams
	w.byKey[key]++
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.all--
		w.streams -= streams
		if w.byKey[key]--; w.byKey[key] == 0 {
			delete(w.byKey, key)
		}
	}, nil
}
