package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// A port is a node's raft port. Two protocols share it, told apart by a connection's first
// byte: raft's messages begin with one below 0x10, and the questions that nodes ask each
// other are HTTP, which begins with a letter.
type port struct {
	id      string
	ln      net.Listener
	members map[string]peer // by node id; where to call them
	raft    chan net.Conn
	http    chan net.Conn
	closed  chan struct{}
	once    sync.Once
	waiting chan struct{} // a token for each connection whose first byte is not here yet
	open    atomic.Bool   // raft has started and takes connections
}

const (
	firstByteTime = 5 * time.Second
	// maxWaiting bounds what strangers who connect and say nothing can hold open.
	maxWaiting = 256
)

func newPort(id string, ln net.Listener, members map[string]peer) *port {
	p := &port{
		id: id, ln: ln, members: members, raft: make(chan net.Conn), http: make(chan net.Conn),
		closed: make(chan struct{}), waiting: make(chan struct{}, maxWaiting),
	}
	go p.accept()
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
		select {
		case p.waiting <- struct{}{}:
			go p.sort(c)
		default:
			c.Close()
		}
	}
}

// sort reads a connection's first byte and hands it to its protocol.
func (p *port) sort(c net.Conn) {
	defer func() { <-p.waiting }()
	var first [1]byte
	c.SetReadDeadline(time.Now().Add(firstByteTime))
	if _, err := io.ReadFull(c, first[:]); err != nil {
		c.Close()
		return
	}
	c.SetReadDeadline(time.Time{})
	to := p.raft
	if first[0] >= 0x10 {
		to = p.http
	} else if !p.open.Load() {
		c.Close()
		return
	}
	select {
	case to <- &sorted{Conn: c, first: first[:]}:
	case <-p.closed:
		c.Close()
	}
}

// Close ends both protocols' listeners. It may be called more than once.
func (p *port) Close() error {
	err := p.ln.Close()
	p.once.Do(func() { close(p.closed) })
	return err
}

// A sorted connection gives its first byte back before the rest.
type sorted struct {
	net.Conn
	first []byte
}

func (c *sorted) Read(b []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(b, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(b)
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

// dial calls a node on its raft port.
func (p *port) dial(ctx context.Context, id string) (net.Conn, error) {
	m, ok := p.members[id]
	if !ok {
		return nil, fmt.Errorf("dial node %s: not in Cluster.Nodes", id)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", m.raft)
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
// space between them; a question that the node cannot answer is a 503.
//
//	/term                    term                 the asked node's current term
//	/revision                revision time        of the leader, confirmed after the question came
//	/barrier                 revision time        the same, behind all that is in the leader's log
//	/state?node=&identity=   state identity       what the asked node's directory holds, see join.go
//	/rejoin?node=&identity=  1                    the leader has taken the asker's vote away
//	/applied                 index                the last raft entry that raft has applied
//	/hash?revision=          hash hash hash hash  of the newest event up to that revision
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
	answer("/revision", limit, func(ctx context.Context, _ url.Values) ([]uint64, error) {
		return stamped(n.confirmed(ctx))
	})
	answer("/barrier", limit, func(ctx context.Context, _ url.Values) ([]uint64, error) {
		return stamped(n.behindLog(ctx))
	})
	answer("/state", limit, func(_ context.Context, q url.Values) ([]uint64, error) {
		identity, err := strconv.ParseUint(q.Get("identity"), 10, 64)
		return []uint64{n.stateFor(q.Get("node"), identity), n.identity}, err
	})
	answer("/rejoin", 2*limit, func(ctx context.Context, q url.Values) ([]uint64, error) {
		identity, err := strconv.ParseUint(q.Get("identity"), 10, 64)
		if err != nil {
			return nil, err
		}
		return []uint64{1}, n.rejoin(ctx, q.Get("node"), identity)
	})
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
			go n.halt(fmt.Errorf("%w; %s", err, rejoinEmpty))
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
	srv := &http.Server{Handler: n.answers(), ReadHeaderTimeout: firstByteTime, MaxHeaderBytes: n.cfg.Limits.MaxHeaderBytes + marksSize, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(n.log.Handler(), slog.LevelWarn)}
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
		IdleConnTimeout:     time.Minute,
		DisableCompression:  true,
	}
}

// ask puts a question to another node; want is how many numbers the answer has.
func (n *raftNode) ask(ctx context.Context, id, path string, want int) ([]uint64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+id+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := n.asker.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("ask node %s for %s: %w", id, path, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(bufio.NewReader(io.LimitReader(resp.Body, 1024)))
	if err != nil {
		return nil, fmt.Errorf("ask node %s for %s: %w", id, path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask node %s for %s: %s: %s", id, path, resp.Status, strings.TrimSpace(string(b)))
	}
	fields := strings.Fields(string(b))
	if len(fields) != want {
		return nil, fmt.Errorf("ask node %s for %s: %d numbers, not %d", id, path, len(fields), want)
	}
	nums := make([]uint64, want)
	for i, f := range fields {
		if nums[i], err = strconv.ParseUint(f, 10, 64); err != nil {
			return nil, fmt.Errorf("ask node %s for %s: %w", id, path, err)
		}
	}
	return nums, nil
}
