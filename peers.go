package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
)

// A port is a node's raft port. Two protocols share it, told apart by a connection's first
// byte: raft's messages begin with one below 0x10, and the questions that nodes ask each
// other are HTTP, which begins with a letter. Where the cluster has a secret, both are inside TLS,
// and neither sees a byte before the other end has proved to be a node of this cluster.
type port struct {
	id     string
	ln     net.Listener
	log    *slog.Logger
	raft   chan net.Conn
	http   chan net.Conn
	closed chan struct{}
	once   sync.Once
	open   atomic.Bool // raft has started and takes connections
	// calledAt is when another node's raft last called before that, in nanoseconds since 1970.
	calledAt atomic.Int64
	ring     atomic.Pointer[keyring]         // nil: plain text. It is changed by setRing
	peers    atomic.Pointer[map[string]peer] // by node id; where to call them. It is changed by setPeers

	mu        sync.Mutex         // guards the rest
	strangers []net.Conn         // those of which nothing is known yet, the oldest first
	live      map[*peerConn]bool // those that are in use
	refused   int                // since the log last spoke of it
	told      time.Time          // when that was
}

const (
	// firstByteTime is how long a stranger may take to say who he is: a handshake, or in plain
	// text the first byte. It is how long a call of another node may take to get there, too.
	firstByteTime = 5 * time.Second
	// maxStrangers is how many may be at that at once. It bounds what those who connect and say
	// nothing hold open: together with helloBytes, to some 10 MB.
	maxStrangers = 256
	// helloBytes is how much a stranger may send before he has proved who he is. A node needs
	// less than 3 KiB, and TLS by itself allows 256 KiB for a certificate.
	helloBytes = 16 << 10
	// peerIdle is how long a connection between nodes may be idle, which its callers use for half
	// as long.
	peerIdle = 2 * time.Minute
	// refusalPause is between two lines about refused connections, with which strangers could
	// otherwise fill the log.
	refusalPause = 10 * time.Second
)

// newPort makes a port. Nothing is accepted before accept runs.
func newPort(id string, ln net.Listener, members map[string]peer, log *slog.Logger) *port {
	p := &port{
		id: id, ln: ln, log: log, raft: make(chan net.Conn), http: make(chan net.Conn),
		closed: make(chan struct{}), live: map[*peerConn]bool{},
	}
	p.peers.Store(&members)
	return p
}

// accept runs until the port is closed.
func (p *port) accept() {
	for {
		c, err := p.ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			p.Close()
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors, most likely; others may give some back
			continue
		}
		p.admit(c)
		go p.sort(c)
	}
}

// admit counts a connection among the strangers. Where there are too many, one is closed: the
// oldest of the address that has the most. So whoever fills the port with connections that say
// nothing loses his own first, from the nodes' own addresses too: a node that calls is the newest
// there, and needs two ways through the network before as many others as are let in come behind it.
// A limit that refused the newest would shut out the nodes.
func (p *port) admit(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.strangers) == maxStrangers {
		count, most := map[netip.Prefix]int{}, 0
		for _, s := range p.strangers {
			count[neighbours(s)]++
			most = max(most, count[neighbours(s)])
		}
		i := slices.IndexFunc(p.strangers, func(s net.Conn) bool { return count[neighbours(s)] == most })
		p.strangers[i].Close() // its own sort does the rest
		p.strangers = slices.Delete(p.strangers, i, i+1)
	}
	p.strangers = append(p.strangers, c)
}

// neighbours is what counts as one address: with IPv6 the network of 64 bits that a machine is
// usually given.
func neighbours(c net.Conn) netip.Prefix {
	at, _ := netip.ParseAddrPort(c.RemoteAddr().String())
	ip := at.Addr().Unmap().WithZone("")
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	prefix, _ := ip.Prefix(bits)
	return prefix
}

// dismiss takes a connection from the strangers; false if admit has closed it.
func (p *port) dismiss(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.Index(p.strangers, c)
	if i >= 0 {
		p.strangers = slices.Delete(p.strangers, i, i+1)
	}
	return i >= 0
}

// sort finds out who is at the other end of a connection, reads the first byte and hands it to its
// protocol.
func (p *port) sort(raw net.Conn) {
	c := &peerConn{Conn: raw, raw: raw, port: p, ring: p.ring.Load()}
	raw.SetDeadline(time.Now().Add(firstByteTime))
	if c.ring != nil {
		err := c.prove()
		if !p.dismiss(raw) {
			err = errCrowded
		}
		if err == nil {
			err = p.keep(c)
		}
		if err == nil {
			_, err = c.Conn.Write(welcome)
		}
		if err != nil {
			c.Close()
			p.refuse(raw, err)
			return
		}
		raw.SetDeadline(time.Now().Add(peerIdle))
	} else if err := p.keep(c); err != nil {
		p.dismiss(raw)
		c.Close()
		return
	}
	var first [1]byte
	_, err := io.ReadFull(c.Conn, first[:])
	p.dismiss(raw) // again, after TLS, does nothing
	if err != nil {
		c.Close()
		return
	}
	raw.SetDeadline(time.Time{})
	c.first = first[:]
	to := p.raft
	if first[0] >= 0x10 {
		to = p.http
	} else if !p.open.Load() {
		p.calledAt.Store(time.Now().UnixNano())
		c.Close()
		return
	}
	select {
	case to <- c:
	case <-p.closed:
		c.Close()
	}
}

// welcome is what a node sends to one that has proved who it is. TLS 1.3 itself lets the caller
// begin before it knows whether it was taken: a write that it forwards then would be of unknown
// outcome, rather than not sent.
var welcome = []byte{0}

var errCrowded = fmt.Errorf("more than %d connections wait to be known", maxStrangers)

// refuse says in the log that a connection was refused, from time to time. Who just went away is
// not worth it.
func (p *port) refuse(c net.Conn, err error) {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return
	}
	p.mu.Lock()
	p.refused++
	count := p.refused
	quiet := time.Since(p.told) < refusalPause
	if !quiet {
		p.refused, p.told = 0, time.Now()
	}
	p.mu.Unlock()
	if !quiet {
		host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		p.log.Warn("connections to the Raft port refused", "count", count, "source", host, "error", err)
	}
}

// keep notes a connection as one in use. Its error says what has changed meanwhile.
func (p *port) keep(c *peerConn) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ring.Load().knows(c.node, c.key) {
		return errors.New("the cluster's secrets have just changed")
	}
	if c.called != "" && (*p.peers.Load())[c.called].raft != c.at {
		return errors.New("the node's address has just changed")
	}
	p.live[c] = true
	return nil
}

// setRing makes k what the port shows and accepts from now on; nil is plain text. A connection
// whose other end has proved itself by what is no longer accepted is closed.
func (p *port) setRing(k *keyring) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ring.Store(k)
	for c := range p.live {
		if !k.knows(c.node, c.key) {
			c.raw.Close() // whoever uses it finds out; a goodbye by TLS could wait
			delete(p.live, c)
		}
	}
}

// setPeers says where the nodes are called from now on. A connection to a place where its node is no
// longer is closed: else one that was replaced under its id would go on being asked.
func (p *port) setPeers(peers map[string]peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.peers.Store(&peers)
	for c := range p.live {
		if m, ok := peers[c.called]; c.called != "" && (!ok || m.raft != c.at) {
			c.raw.Close()
			delete(p.live, c)
		}
	}
}

// Close ends both protocols' listeners. It may be called more than once.
func (p *port) Close() error {
	err := p.ln.Close()
	p.once.Do(func() { close(p.closed) })
	return err
}

// A peerConn is a connection of a port, accepted or called. It gives the byte that was read of it
// back before the rest.
type peerConn struct {
	net.Conn // TLS, or raw
	raw      net.Conn
	port     *port
	ring     *keyring // by which it was made
	node     string   // who the other end has proved to be; "" in plain text
	key      string   // and by which public key
	called   string   // the node that was called; "" of an accepted connection
	at       string   // and where
	first    []byte
}

// prove is the accepting end's handshake.
func (c *peerConn) prove() error {
	r := &rationed{Conn: c.raw, left: helloBytes}
	t := tls.Server(r, c.ring.config(func(node string) bool { return node != c.port.id }))
	if err := t.Handshake(); err != nil {
		return err
	}
	r.left = -1
	c.Conn = t
	c.node, c.key = proved(t.ConnectionState())
	return nil
}

func (c *peerConn) Read(b []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(b, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

// Close implements net.Conn.
func (c *peerConn) Close() error {
	c.port.mu.Lock()
	delete(c.port.live, c)
	c.port.mu.Unlock()
	return c.Conn.Close()
}

// A rationed connection gives left bytes at most; any number if that is negative.
type rationed struct {
	net.Conn
	left int
}

func (c *rationed) Read(b []byte) (int, error) {
	if c.left < 0 {
		return c.Conn.Read(b)
	}
	if c.left == 0 {
		return 0, fmt.Errorf("more than %d bytes before the handshake ended", helloBytes)
	}
	n, err := c.Conn.Read(b[:min(len(b), c.left)])
	c.left -= n
	return n, err
}

// A raftStream is raft's side of a port. Its addresses are node ids.
type raftStream struct{ *port }

// Accept implements net.Listener.
func (s raftStream) Accept() (net.Conn, error) {
	select {
	case c := <-s.raft:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener; raft takes it for its own name.
func (s raftStream) Addr() net.Addr { return nodeAddr(s.id) }

// Dial implements raft.StreamLayer.
func (s raftStream) Dial(id raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return s.dial(ctx, string(id))
}

// dial calls a node on its raft port. Where the cluster has a secret, it returns when each end has
// proved to the other which node it is. Any error is a *net.OpError of dial or says that there is no
// such node.
func (p *port) dial(ctx context.Context, id string) (net.Conn, error) {
	m, ok := (*p.peers.Load())[id]
	if !ok {
		return nil, fmt.Errorf("dial node %s: no address is known", id)
	}
	return p.call(ctx, id, &peerConn{called: id, at: m.raft})
}

// try is dial at an address of which it is not known whether the node is there.
func (p *port) try(ctx context.Context, id, at string) (net.Conn, error) {
	return p.call(ctx, id, &peerConn{at: at})
}

func (p *port) call(ctx context.Context, id string, c *peerConn) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, firstByteTime)
	defer cancel()
	var d net.Dialer
	raw, err := d.DialContext(ctx, "tcp", c.at)
	if err != nil {
		return nil, err
	}
	c.Conn, c.raw, c.port, c.ring = raw, raw, p, p.ring.Load()
	if c.ring != nil {
		stop := context.AfterFunc(ctx, func() { raw.Close() })
		t := tls.Client(raw, c.ring.config(func(node string) bool { return node == id }))
		if err = t.Handshake(); err == nil {
			_, err = io.ReadFull(t, make([]byte, len(welcome)))
		}
		if !stop() {
			err = ctx.Err()
		}
		c.Conn = t
		c.node, c.key = proved(t.ConnectionState())
	}
	if err == nil {
		err = p.keep(c)
	}
	if err != nil {
		raw.Close()
		return nil, &net.OpError{Op: "dial", Net: "node " + id, Addr: raw.RemoteAddr(), Err: err}
	}
	return c, nil
}

// An askStream is the side of a port on which nodes ask each other. Closing it leaves raft's
// side open.
type askStream struct {
	*port
	ended context.Context
	end   context.CancelFunc
}

// Accept implements net.Listener.
func (s askStream) Accept() (net.Conn, error) {
	select {
	case c := <-s.http:
		return c, nil
	case <-s.closed:
	case <-s.ended.Done():
	}
	return nil, net.ErrClosed
}

// Close implements net.Listener.
func (s askStream) Close() error {
	s.end()
	return nil
}

// Addr implements net.Listener.
func (s askStream) Addr() net.Addr { return nodeAddr(s.id) }

// A nodeAddr is a node's id as an address.
type nodeAddr string

func (nodeAddr) Network() string  { return "node" }
func (a nodeAddr) String() string { return string(a) }

// Nodes ask each other with GET on the raft port. An answer is numbers in decimal with a
// space between them, or where it says so JSON; a question that the node cannot answer is a 503.
//
//	/term                    term                 the asked node's current term
//	/acknowledged            revision time        of the leader, see question
//	/revision                revision time        likewise
//	/barrier                 revision time        likewise
//	/state?node=&identity=   state identity       what the asked node's directory holds, see join.go. With
//	                                              of= and api= it answers only if it is that node and serves
//	                                              its API on that port
//	/rejoin?node=&identity=  1                    the leader has taken the asker's vote away. With join= it
//	                                              does so only for a node that was added
//	/applied                 index                the last raft entry that raft has applied
//	/hash?revision=          hash hash hash hash  of the newest event up to that revision
//	/node                    JSON of nodeRow      how the asked node is
//	/members                 JSON of membership   who belongs to the cluster, as the asked node knows
//
// Under /api/ it is the API, for the writes that they forward.
//
// time is the leader's clock in nanoseconds since 1970, read before it answered.
func (n *raftNode) answers() http.Handler {
	mux := http.NewServeMux()
	answer := func(path string, limit time.Duration, f func(ctx context.Context, q url.Values) ([]uint64, error)) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), limit)
			defer cancel()
			nums, err := f(ctx, r.URL.Query())
			if err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			var b []byte
			for i, v := range nums {
				if i > 0 {
					b = append(b, ' ')
				}
				b = strconv.AppendUint(b, v, 10)
			}
			w.Header()["Content-Type"] = typeText
			w.Write(b)
		})
	}
	limit := n.cfg.requestTimeout()
	answer("/term", limit, func(context.Context, url.Values) ([]uint64, error) { return []uint64{n.term()}, nil })
	for q, path := range questionPaths {
		answer(path, limit, func(ctx context.Context, _ url.Values) ([]uint64, error) {
			return stamped(n.answer(ctx, question(q)))
		})
	}
	answer("/state", limit, func(_ context.Context, q url.Values) ([]uint64, error) {
		if of, api := q.Get("of"), strconv.Itoa(n.cfg.self().ApiPort); of != "" && of != n.id {
			return nil, fmt.Errorf("this is node %s", n.id)
		} else if of != "" && q.Get("api") != api {
			return nil, fmt.Errorf("by its file node %s serves its API on port %s", n.id, api)
		}
		identity, err := strconv.ParseUint(q.Get("identity"), 10, 64)
		return []uint64{n.stateFor(q.Get("node"), identity), n.identity}, err
	})
	answer("/rejoin", 2*limit, func(ctx context.Context, q url.Values) ([]uint64, error) {
		identity, err := strconv.ParseUint(q.Get("identity"), 10, 64)
		if err != nil {
			return nil, err
		}
		return []uint64{1}, n.rejoin(ctx, q.Get("node"), identity, q.Has("join"))
	})
	document := func(path string, f func() any) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			b, err := json.Marshal(f())
			if err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			w.Header()["Content-Type"] = typeJSON
			w.Write(b)
		})
	}
	document("/node", func() any { return n.row() })
	document("/members", func() any { return n.membership() })
	answer("/applied", limit, func(context.Context, url.Values) ([]uint64, error) {
		r := n.raft.Load()
		if r == nil {
			return nil, errors.New("raft has not started here")
		}
		return []uint64{r.AppliedIndex()}, nil
	})
	answer("/hash", limit, func(_ context.Context, q url.Values) ([]uint64, error) {
		rev, err := strconv.ParseUint(q.Get("revision"), 10, 64)
		if err != nil {
			return nil, err
		}
		h, ok, err := n.store.hashAt(rev)
		if errors.Is(err, errCorrupt) {
			go n.halt(fmt.Errorf("%w; %s", err, rebuildState))
		}
		if err == nil && !ok {
			err = errors.New("this node has no event of that revision")
		}
		return hashNumbers(h), err
	})
	mux.HandleFunc("/api/", func(w http.ResponseWriter, r *http.Request) {
		if h := n.api.Load(); h != nil {
			h.ServeHTTP(w, r)
		} else {
			http.Error(w, "starting", http.StatusServiceUnavailable)
		}
	})
	return mux
}

// serveAsks answers the other nodes until the node stops.
func (n *raftNode) serveAsks() error {
	answers := n.answers()
	h := func(w http.ResponseWriter, r *http.Request) {
		// When the secrets have changed, connections end behind an answer rather than in the middle
		// of a write that was passed on, when they are closed.
		if c := r.Context().Value(betweenNodes{}).(*peerConn); c.ring != n.port.ring.Load() {
			w.Header()["Connection"] = []string{"close"}
		}
		answers.ServeHTTP(w, r)
	}
	srv := &http.Server{Handler: http.HandlerFunc(h), ReadHeaderTimeout: firstByteTime, MaxHeaderBytes: n.cfg.Limits.MaxHeaderBytes*5/4 + marksSize, IdleTimeout: peerIdle,
		ErrorLog: slog.NewLogLogger(n.log.Handler(), slog.LevelWarn),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, betweenNodes{}, c)
		}}
	context.AfterFunc(n.ctx, func() { srv.Close() })
	ended, end := context.WithCancel(context.Background())
	if err := srv.Serve(askStream{n.port, ended, end}); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// stamped adds the clock to a revision.
func stamped(rev uint64, err error) ([]uint64, error) {
	return []uint64{rev, uint64(time.Now().UnixNano())}, err
}

// newAsker makes a client for questions to other nodes, which keeps up to idle connections to
// each. The host of a URL is a node id. It follows no redirect and asks no proxy.
func newAsker(p *port, idle int) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			host, _, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			return p.dial(ctx, host)
		},
		MaxIdleConnsPerHost: idle,
		IdleConnTimeout:     peerIdle / 2,
		DisableCompression:  true,
	}
}

// askBytes is how long an answer may be.
const askBytes = 1 << 20

// askAny puts a question to another node and returns its answer.
func askAny(ctx context.Context, by http.RoundTripper, id, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+id+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := by.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("ask node %s for %s: %w", id, path, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, askBytes))
	if err != nil {
		return nil, fmt.Errorf("ask node %s for %s: %w", id, path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask node %s for %s: %s: %s", id, path, resp.Status, strings.TrimSpace(string(b)))
	}
	return b, nil
}

// askFor puts a question whose answer is JSON to another node.
func (n *raftNode) askFor(ctx context.Context, id, path string, to any) error {
	b, err := askAny(ctx, n.asker.Load(), id, path)
	if err == nil {
		err = json.Unmarshal(b, to)
	}
	return err
}

// ask puts a question to another node; want is how many numbers the answer has.
func (n *raftNode) ask(ctx context.Context, id, path string, want int) ([]uint64, error) {
	b, err := askAny(ctx, n.asker.Load(), id, path)
	if err != nil {
		return nil, err
	}
	return numbers(b, id, path, want)
}

// numbers reads the answer of a node to a question.
func numbers(b []byte, id, path string, want int) (nums []uint64, err error) {
	fields := strings.Fields(string(b))
	if len(fields) != want {
		return nil, fmt.Errorf("ask node %s for %s: %d numbers, not %d", id, path, len(fields), want)
	}
	nums = make([]uint64, want)
	for i, f := range fields {
		if nums[i], err = strconv.ParseUint(f, 10, 64); err != nil {
			return nil, fmt.Errorf("ask node %s for %s: %w", id, path, err)
		}
	}
	return nums, nil
}
