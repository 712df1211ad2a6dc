package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
)

// A raftNode is this process's part in the cluster: raft, its log and its connections.
type raftNode struct {
	id      string
	cfg     *config
	log     *slog.Logger
	store   *store
	raft    *raft.Raft
	trans   *raft.NetworkTransport
	logs    *raftLog
	members map[string]peer // by node id
	lock    *os.File        // held while the process uses the data directory

	// led is the term in which this node leads and has applied everything that earlier
	// leaders committed; 0 while that is not known.
	led atomic.Uint64

	stop    chan struct{}
	failed  chan error    // what the node cannot live without failed; read by run
	watched chan struct{} // closed when watchLeadership has ended
}

// A peer is where one node of the cluster is reached.
type peer struct {
	raft string // host:port of its raft port
	api  string // base URL of its API, without a slash at the end
}

// lockDir takes the data directory for this process until it ends.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("data directory %s is in use by another process", dir)
		}
		return nil, &os.PathError{Op: "flock", Path: f.Name(), Err: err}
	}
	return f, nil
}

// startRaft opens raft's files in dir and joins the cluster on ln. It bootstraps a node
// that has no state: every node does so with the same configuration, in which the first
// election decides.
func startRaft(cfg *config, dir string, st *store, ln net.Listener, logger *slog.Logger) (*raftNode, error) {
	n := &raftNode{
		id: cfg.Cluster.NodeId, cfg: cfg, log: logger, store: st, members: map[string]peer{},
		stop: make(chan struct{}), failed: make(chan error, 1), watched: make(chan struct{}),
	}
	var servers []raft.Server
	for _, m := range cfg.Cluster.Nodes {
		n.members[m.Id] = peer{raft: hostPort(m.Address, m.RaftPort), api: "http://" + hostPort(m.Address, m.ApiPort)}
		// Raft remembers votes by address bytes. Ours are node ids, which are unique, and
		// dial finds the host behind one: no two nodes can look like one, whatever they listen on.
		servers = append(servers, raft.Server{ID: raft.ServerID(m.Id), Address: raft.ServerAddress(m.Id)})
	}
	slices.SortFunc(servers, func(a, b raft.Server) int { return strings.Compare(string(a.ID), string(b.ID)) })

	path := filepath.Join(dir, "raft.db")
	bolt, err := raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: &bbolt.Options{
		Timeout:      time.Second,
		FreelistType: bbolt.FreelistMapType,
		// The log is short, so the scan that an open then needs is too, and each append is
		// spared the list of the pages that truncation freed.
		NoFreelistSync:  true,
		NoStatistics:    true,
		InitialMmapSize: 4 << 30, // address space; see openDB
	}})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	n.logs = &raftLog{BoltStore: bolt, path: path, halt: n.halt}
	hlog := &raftLogger{Logger: hclog.NewNullLogger(), log: logger}
	snaps, err := raft.NewFileSnapshotStoreWithLogger(dir, 2, hlog)
	if err != nil {
		return nil, fmt.Errorf("open %s/snapshots: %w", dir, err)
	}
	newest := uint64(0)
	if metas, err := snaps.List(); err != nil {
		return nil, fmt.Errorf("list %s/snapshots: %w", dir, err)
	} else if len(metas) > 0 {
		newest = metas[0].Index
	}
	last, err := bolt.LastIndex()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if at := st.at().index; at > max(last, newest) {
		return nil, fmt.Errorf("%s/state.db is ahead of raft's log and snapshots (%d, they end at %d): part of the directory was lost; "+
			"move it away and let the node join empty", dir, at, max(last, newest))
	}

	n.trans = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: &stream{Listener: ln, node: n},
		Logger: hlog,
		// One request in flight: pipelining can wedge on a rejected append while heartbeats
		// look healthy (hashicorp/raft issue 612), and measured here it gains nothing.
		MaxRPCsInFlight: 1,
		MaxPool:         4,
		Timeout:         10 * time.Second,
	})
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(n.id)
	conf.Logger = hlog
	// Raft draws from the lower timeout to twice that. A leader that has heard from no quorum
	// for the same time steps down.
	conf.HeartbeatTimeout = time.Duration(cfg.Cluster.LowerElectionTimeout) * time.Millisecond
	conf.ElectionTimeout = conf.HeartbeatTimeout
	conf.LeaderLeaseTimeout = conf.HeartbeatTimeout
	// Followers learn of a commit with the next append, at latest after twice this.
	conf.CommitTimeout = 5 * time.Millisecond
	conf.MaxAppendEntries = 128
	conf.TrailingLogs = trailingLogs
	conf.SnapshotInterval = time.Hour // takeSnapshots decides, not raft
	conf.SnapshotThreshold = 1 << 62
	// A state file that holds the newest snapshot need not be made from it again.
	conf.NoSnapshotRestoreOnStart = st.at().index >= newest
	conf.ShutdownOnRemove = false
	conf.NoLegacyTelemetry = true

	cache, err := raft.NewLogCache(512, n.logs)
	if err != nil {
		return nil, err
	}
	if has, err := raft.HasExistingState(cache, n.logs, snaps); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	} else if !has {
		if err := raft.BootstrapCluster(conf, cache, n.logs, snaps, n.trans, raft.Configuration{Servers: servers}); err != nil {
			return nil, fmt.Errorf("bootstrap %s: %w", path, err)
		}
	}
	n.raft, err = raft.NewRaft(conf, &fsm{store: st, log: logger, halt: n.halt}, cache, n.logs, snaps, n.trans)
	if err != nil {
		return nil, fmt.Errorf("start raft in %s: %w", dir, err)
	}
	n.logs.mark()
	go n.watchLeadership()
	go n.takeSnapshots()
	return n, nil
}

// halt reports that the node cannot go on and never returns to its caller, so that
// nothing follows on what failed. run ends the process.
func (n *raftNode) halt(err error) {
	select {
	case n.failed <- err:
	default:
	}
	select {}
}

// watchLeadership keeps led.
func (n *raftNode) watchLeadership() {
	defer close(n.watched)
	for {
		select {
		case <-n.stop:
			return
		case leads := <-n.raft.LeaderCh():
			n.led.Store(0)
			n.store.changed.ring() // readiness may depend on it
			if !leads {
				continue
			}
			term := n.raft.CurrentTerm()
			// Behind this barrier the state holds every write that any leader acknowledged:
			// an entry of the own term is committed, and all before it is applied.
			if err := n.raft.Barrier(0).Error(); err != nil {
				n.log.Warn("leadership lost before it began", "term", term, "error", err)
				continue
			}
			if n.raft.CurrentTerm() == term {
				n.led.Store(term)
				n.log.Info("leading", "term", term, "revision", n.store.at().rev)
			}
		}
	}
}

// leads reports whether raft takes this node for the leader and it has caught up with its
// predecessors. It may have been replaced already.
func (n *raftNode) leads() bool {
	return n.raft.State() == raft.Leader && n.led.Load() == n.raft.CurrentTerm()
}

// leader returns the id and the API's base URL of the leader that this node knows,
// or "". The address is from the configuration, never from a request: a client's key
// follows a redirect.
func (n *raftNode) leader() (id, api string) {
	_, sid := n.raft.LeaderWithID()
	id = string(sid)
	m, ok := n.members[id]
	if !ok {
		return "", ""
	}
	return id, m.api
}

// role is what /health/ready calls the node.
func (n *raftNode) role() string {
	switch n.raft.State() {
	case raft.Leader:
		return "leader"
	case raft.Candidate:
		return "candidate"
	}
	return "follower"
}

// staleness is an upper bound on how old a read of this node can be, by an estimate from the
// last contact with the leader; false where nothing can be said.
func (n *raftNode) staleness() (time.Duration, bool) {
	if n.leads() {
		return 0, true
	}
	last := n.raft.LastContact()
	if last.IsZero() || n.raft.State() == raft.Leader {
		return 0, false
	}
	return time.Since(last), true
}

// propose commits a command and returns what applying it gave. It gives up at the
// deadline. Any error says what became of the command: errUnknown that it may or may not be
// applied, now or later; any other that it is not and will not be.
func (n *raftNode) propose(cmd *command, deadline time.Time) (*result, error) {
	cmd.At = time.Now().UnixNano()
	data, err := cmd.encode()
	if err != nil {
		return nil, err
	}
	wait := time.Until(deadline)
	if wait <= 0 {
		return nil, errUnavailable.because("the request waited too long to be proposed; try again")
	}
	f := n.raft.Apply(data, wait)
	done := make(chan error, 1)
	go func() { done <- f.Error() }() // a future has no clock of its own
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case err = <-done:
	case <-timer.C:
		return nil, errUnknown.because("no majority confirmed the write in time; it may or may not be made: repeat it conditionally, or settle it by its correlation id in the audit trail")
	}
	switch {
	case err == nil:
		// What the FSM refuses comes here too; nil is an entry that it did not see.
		if res, ok := f.Response().(*result); ok && res != nil {
			return res, res.err
		}
		return nil, errUnknown.because("the write was committed, but this node cannot say what became of it: read the key")
	case errors.Is(err, raft.ErrNotLeader):
		return nil, errNoLeader.because("this node ceased to lead before it proposed the write; try again")
	case errors.Is(err, raft.ErrLeadershipTransferInProgress), errors.Is(err, raft.ErrEnqueueTimeout):
		return nil, errUnavailable.because("leadership is being handed over; try again")
	}
	return nil, &problem{kind: errUnknown, cause: err,
		detail: "leadership was lost with the write in flight; it may or may not be made: repeat it conditionally, or settle it by its correlation id in the audit trail"}
}

// propose fills in who asks and proposes the command.
func (s *server) propose(c *call, cmd *command) (*result, error) {
	cmd.Actor, cmd.Source, cmd.ID = c.who.principal, clientIP(c.r), c.id
	res, err := s.node.propose(cmd, c.start.Add(s.cfg.requestTimeout()))
	if res != nil {
		c.sawRevision(max(res.rev, s.store.at().rev))
	}
	if err != nil {
		return nil, err
	}
	return res, nil
}

// requestTimeout is how long a request may take.
func (c *config) requestTimeout() time.Duration {
	return time.Duration(c.Cluster.RequestTimeout) * time.Millisecond
}

// markForwarded is the header of a write that another node passes on; its value is that
// node's id.
const markForwarded = "Confman-Forwarded"

// gate decides where a write goes. done says that it is answered; else this node serves it.
func (s *server) gate(c *call) (done bool, err error) {
	stage := s.stopping.Load()
	switch {
	case stage == draining:
		return false, errUnavailable.because("this node is shutting down; try again, here or on another node")
	case stage == serving && s.node.leads():
		return false, nil
	case c.r.Header[markForwarded] != nil:
		return false, errNoLeader.because("this node does not lead, and the write was forwarded already; try again")
	}
	id, api := s.node.leader()
	if id == "" || id == s.node.id {
		return false, errNoLeader.because("no leader is known; try again")
	}
	if stage == handedOver {
		c.w.Header()["Connection"] = []string{"close"}
	} else if s.cfg.Cluster.Forward {
		return true, s.forward(c, id, api)
	}
	c.w.Header()["Location"] = []string{api + c.r.URL.RequestURI()}
	return false, errNotLeader.because("this node follows; send the write to %s (curl -L does)", api)
}

// forwarder carries forwarded writes. It follows no redirect and asks no proxy.
var forwarder = &http.Transport{
	DialContext:         (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
	MaxIdleConnsPerHost: 256,
	IdleConnTimeout:     time.Minute,
	DisableCompression:  true,
}

// forward passes a write on to the leader with the caller's own key and headers, and
// answers what it says once this node has applied the write.
func (s *server) forward(c *call, leader, api string) error {
	body, err := c.body()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithDeadline(c.r.Context(), c.start.Add(s.cfg.requestTimeout()))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, c.r.Method, api+c.r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	hop := map[string]bool{"Connection": true, "Keep-Alive": true, "Proxy-Connection": true, "Te": true, "Trailer": true,
		"Transfer-Encoding": true, "Upgrade": true, "Expect": true, "Content-Length": true, "X-Correlation-Id": true}
	for _, v := range c.r.Header["Connection"] {
		for name := range strings.SplitSeq(v, ",") {
			hop[http.CanonicalHeaderKey(strings.TrimSpace(name))] = true
		}
	}
	for name, v := range c.r.Header {
		if !hop[name] {
			req.Header[name] = v
		}
	}
	if req.Header["User-Agent"] == nil {
		req.Header["User-Agent"] = []string{""} // send none rather than Go's
	}
	req.Header["X-Correlation-Id"] = []string{c.id}
	req.Header[markForwarded] = []string{s.node.id}
	resp, err := forwarder.RoundTrip(req)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" {
			return &problem{kind: errUnavailable, detail: "the leader cannot be reached; try again", cause: err}
		}
		return brokenHop(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxPage))
	if err != nil {
		return brokenHop(err)
	}
	if resp.StatusCode < 300 {
		rev, err := strconv.ParseUint(resp.Header.Get("Confman-Revision"), 10, 64)
		if err != nil {
			return brokenHop(fmt.Errorf("leader %s: Confman-Revision: %w", leader, err))
		}
		if !s.store.waitFor(ctx, rev) {
			return errUnknown.because("the leader made the write as revision %d, but this node has not applied it in time", rev)
		}
	}
	h := c.w.Header()
	for _, name := range []string{"Content-Type", "Etag", "Retry-After", "Www-Authenticate", "Allow"} {
		if v := resp.Header[name]; v != nil {
			h[name] = v
		}
	}
	c.sawRevision(s.store.at().rev)
	if resp.StatusCode != http.StatusNoContent {
		h["Content-Length"] = []string{strconv.Itoa(len(answer))}
	}
	c.w.WriteHeader(resp.StatusCode)
	_, err = c.w.Write(answer)
	if errors.Is(err, http.ErrBodyNotAllowed) {
		err = nil
	}
	return err
}

func brokenHop(err error) error {
	return &problem{kind: errUnknown, cause: err,
		detail: "the connection to the leader broke with the write under way; it may or may not be made: repeat it conditionally, or settle it by its correlation id in the audit trail"}
}

// waitFor waits until the store has applied revision rev; false if ctx ends before.
func (s *store) waitFor(ctx context.Context, rev uint64) bool {
	for {
		bell := s.changed.wait()
		if s.at().rev >= rev {
			return true
		}
		select {
		case <-bell:
		case <-ctx.Done():
			return false
		}
	}
}

// handOver gives leadership away, if this node has it and another can take it.
func (n *raftNode) handOver() {
	if n.raft.State() != raft.Leader {
		return
	}
	if err := n.raft.LeadershipTransfer().Error(); err != nil {
		n.log.Warn("leadership not handed over", "error", err)
	}
}

// Close ends raft. The store is not used by it afterwards.
func (n *raftNode) Close() error {
	close(n.stop)
	err := n.raft.Shutdown().Error()
	<-n.watched
	n.trans.Close()
	if cerr := n.logs.Close(); err == nil {
		err = cerr
	}
	return err
}

// trailingLogs is how many entries stay in the log behind a snapshot, so that a follower that
// was away for a moment needs no snapshot.
const trailingLogs = 8192

// takeSnapshots writes a snapshot, which lets the log be cut, when the log since the last
// one has snapshotEntries entries and a quarter of the state's bytes: so a restart replays
// seconds, and the cost of copying the state is spread over as many writes as it is large.
func (n *raftNode) takeSnapshots() {
	const (
		snapshotEntries = 8192
		snapshotMost    = 1 << 20 // entries after which the state's size does not matter
	)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-n.stop:
			return
		case <-tick.C:
		}
		entries, size := n.logs.grown()
		if entries < snapshotEntries || size < n.store.size()/4 && entries < snapshotMost {
			continue
		}
		n.logs.mark()
		if err := n.raft.Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) && !errors.Is(err, raft.ErrRaftShutdown) {
			n.log.Error("snapshot not taken", "error", err)
		}
	}
}

// size is that of the state file, in bytes.
func (s *store) size() int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	info, err := os.Stat(s.db.Path())
	if err != nil {
		return 0
	}
	return info.Size()
}

// A raftLog is raft's log, term and vote on the disk. A failing disk ends the node: after
// one failed fsync nobody knows what is on it.
type raftLog struct {
	*raftboltdb.BoltStore
	path string
	halt func(error)

	entries, bytes atomic.Int64 // appended since mark
}

func (l *raftLog) check(op string, err error) error {
	if err != nil {
		l.halt(fmt.Errorf("%s %s: %w; check the disk, then start the node again", op, l.path, err))
	}
	return err
}

// StoreLogs implements raft.LogStore.
func (l *raftLog) StoreLogs(logs []*raft.Log) error {
	size := 0
	for _, e := range logs {
		size += len(e.Data)
	}
	if err := l.check("append to", l.BoltStore.StoreLogs(logs)); err != nil {
		return err
	}
	l.entries.Add(int64(len(logs)))
	l.bytes.Add(int64(size))
	return nil
}

// StoreLog implements raft.LogStore.
func (l *raftLog) StoreLog(e *raft.Log) error { return l.StoreLogs([]*raft.Log{e}) }

// DeleteRange implements raft.LogStore.
func (l *raftLog) DeleteRange(min, max uint64) error {
	return l.check("truncate", l.BoltStore.DeleteRange(min, max))
}

// Set implements raft.StableStore.
func (l *raftLog) Set(k, v []byte) error {
	return l.check("write term or vote to", l.BoltStore.Set(k, v))
}

// SetUint64 implements raft.StableStore.
func (l *raftLog) SetUint64(k []byte, v uint64) error {
	return l.check("write term or vote to", l.BoltStore.SetUint64(k, v))
}

// mark begins counting anew.
func (l *raftLog) mark() { l.entries.Store(0); l.bytes.Store(0) }

// grown is what was appended since mark.
func (l *raftLog) grown() (entries, bytes int64) { return l.entries.Load(), l.bytes.Load() }

// A stream connects raft's transports. Its addresses are node ids.
type stream struct {
	net.Listener
	node *raftNode
}

// Dial implements raft.StreamLayer.
func (s *stream) Dial(id raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	m, ok := s.node.members[string(id)]
	if !ok {
		return nil, fmt.Errorf("dial node %s: not in Cluster.Nodes", id)
	}
	return net.DialTimeout("tcp", m.raft, timeout)
}

// Addr implements net.Listener; raft takes it for its own name.
func (s *stream) Addr() net.Addr { return nodeAddr(s.node.id) }

// A nodeAddr is a node's id as an address.
type nodeAddr string

func (nodeAddr) Network() string  { return "node" }
func (a nodeAddr) String() string { return string(a) }

// A raftLogger passes raft's log lines on to slog at their own level.
type raftLogger struct {
	hclog.Logger // answers what is not overridden, and says nothing
	log          *slog.Logger
}

var slogLevels = map[hclog.Level]slog.Level{
	hclog.Trace: slog.LevelDebug, hclog.Debug: slog.LevelDebug, hclog.Info: slog.LevelInfo,
	hclog.Warn: slog.LevelWarn, hclog.Error: slog.LevelError,
}

func (l *raftLogger) Log(level hclog.Level, msg string, args ...any) {
	for i, a := range args {
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			args[i] = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
	}
	l.log.Log(context.Background(), slogLevels[level], "raft: "+msg, args...)
}
func (l *raftLogger) Trace(msg string, args ...any)  { l.Log(hclog.Trace, msg, args...) }
func (l *raftLogger) Debug(msg string, args ...any)  { l.Log(hclog.Debug, msg, args...) }
func (l *raftLogger) Info(msg string, args ...any)   { l.Log(hclog.Info, msg, args...) }
func (l *raftLogger) Warn(msg string, args ...any)   { l.Log(hclog.Warn, msg, args...) }
func (l *raftLogger) Error(msg string, args ...any)  { l.Log(hclog.Error, msg, args...) }
func (l *raftLogger) IsDebug() bool                  { return l.log.Enabled(context.Background(), slog.LevelDebug) }
func (l *raftLogger) IsInfo() bool                   { return true }
func (l *raftLogger) IsWarn() bool                   { return true }
func (l *raftLogger) IsError() bool                  { return true }
func (l *raftLogger) Named(string) hclog.Logger      { return l }
func (l *raftLogger) ResetNamed(string) hclog.Logger { return l }
func (l *raftLogger) With(args ...any) hclog.Logger {
	return &raftLogger{Logger: l.Logger, log: l.log.With(args...)}
}
func (l *raftLogger) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return slog.NewLogLogger(l.log.Handler(), slog.LevelInfo)
}
