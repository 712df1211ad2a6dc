package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"
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
	port    *port           // raft's connections and the nodes' questions to each other
	asker   *http.Transport

	// led is the term in which this node leads and has applied everything that earlier
	// leaders committed; 0 while that is not known.
	led atomic.Uint64

	// What waits for a leader's word shares one question: rounds and barriers on the
	// leader, questions and barrierQuestions on the way to it.
	rounds, barriers, questions, barrierQuestions shared

	freshSince  atomic.Pointer[time.Time] // see knownFresh; nil while nothing is known
	leaderClock atomic.Pointer[clockReading]

	ctx    context.Context // over when the node stops
	stop   context.CancelFunc
	tasks  errgroup.Group
	failed chan error // what the node cannot live without failed; read by run
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
		failed: make(chan error, 1),
	}
	n.ctx, n.stop = context.WithCancel(context.Background())
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

	n.port = newPort(n.id, ln, n.members)
	n.asker = newAsker(n.port)
	n.trans = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: raftStream{n.port},
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
	n.tasks.Go(n.watchLeadership)
	n.tasks.Go(n.takeSnapshots)
	n.tasks.Go(n.keepFresh)
	n.tasks.Go(func() error {
		srv := &http.Server{Handler: n.serveAsks(), ReadHeaderTimeout: firstByteTime, MaxHeaderBytes: 4 << 10,
			ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelWarn)}
		context.AfterFunc(n.ctx, func() { srv.Close() })
		if err := srv.Serve(askStream{n.port}); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
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
func (n *raftNode) watchLeadership() error {
	for {
		select {
		case <-n.ctx.Done():
			return nil
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

// propose commits a command and returns what applying it gave. It gives up at the
// deadline. Any error says what became of the command: errUnknown that it may or may not be
// applied, now or later; any other that it is not and will not be.
func (n *raftNode) propose(cmd *command, deadline time.Time) (*result, error) {
	cmd.At, cmd.Until = time.Now().UnixNano(), deadline.UnixNano()
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
	res, err := s.node.propose(cmd, c.deadline())
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
	n.stop()
	err := errors.Join(n.raft.Shutdown().Error(), n.tasks.Wait())
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
func (n *raftNode) takeSnapshots() error {
	const (
		snapshotEntries = 8192
		snapshotMost    = 1 << 20 // entries after which the state's size does not matter
	)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-n.ctx.Done():
			return nil
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
