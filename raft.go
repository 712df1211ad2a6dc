package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
)

// A raftNode is this process's part in the cluster: raft, its log and its connections.
type raftNode struct {
	id              string
	cfg             *config
	log             *slog.Logger
	store           *store
	dir             string
	began           time.Time
	raft            atomic.Pointer[raft.Raft] // nil until the node may take part
	trans           *raft.NetworkTransport
	logs            *raftLog
	recent          raft.LogStore // a cache over logs
	snaps           *snapshotStore
	disk            *disk
	port            *port                            // raft's connections and the nodes' questions to each other
	asker, forwards atomic.Pointer[http.Transport]   // for questions, and for writes passed on
	api             atomic.Pointer[http.HandlerFunc] // nil until the server is there

	identity uint64 // of the data directory, see join.go
	formed   atomic.Pointer[map[string]uint64]
	rejoins  sync.Mutex             // held while the leader changes raft's configuration
	waitsFor atomic.Pointer[string] // why raft is not started yet

	roster    atomic.Pointer[roster]
	reckoning sync.Mutex     // guards logged and told, and is held while roster is made
	logged    []loggedRecord // in the order of the log
	told      []nodeRecord   // by another node, see learn
	removedAt atomic.Uint64  // the index of the state by which another node said that this one was removed
	due       chan struct{}  // the membership is not what it should be; room for one
	ordering  chan struct{}  // holds one while a request changes the membership

	// led is the term in which this node leads and has applied everything that earlier
	// leaders committed; 0 while that is not known.
	led atomic.Uint64

	quiet atomic.Uint64 // see holds

	// What waits for a leader's word shares one question: rounds and barriers on the
	// leader, asking on the way to it.
	rounds, barriers shared
	asking           [questions]shared

	freshSince  atomic.Pointer[time.Time] // see knownFresh; nil while nothing is known
	leaderClock atomic.Pointer[clockReading]

	proposals chan *proposal
	committed histogram // from proposal to result, where there was one

	raftMetrics prometheus.Gatherer // nil where raft does not count
	leaders     atomic.Uint64       // that this node has seen begin
	heard       sync.Map            // by node id, the raft index that it has applied as it last said; see lags
	snapshots   struct{ taken, failed atomic.Uint64 }

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

// startNode opens raft's files in dir and takes part in the cluster on ln. Where dir holds
// nothing of raft's, the node first finds out whether it may (see join.go), and until then
// serves its API without knowing a leader. What the node cannot live without and fails, now or
// later, is sent to failed.
func startNode(cfg *config, dir string, st *store, ln net.Listener, logger *slog.Logger, failed chan error) (*raftNode, error) {
	n := &raftNode{
		id: cfg.Cluster.NodeId, cfg: cfg, dir: dir, log: logger, store: st,
		failed: failed, began: time.Now(), proposals: make(chan *proposal, 4*sharedCommands),
		due: make(chan struct{}, 1), ordering: make(chan struct{}, 1),
	}
	n.ctx, n.stop = context.WithCancel(context.Background())
	n.disk = newDisk(dir, uint64(cfg.Storage.MinFreeMiB)<<20, logger, n.halt)
	var err error
	if n.logs, err = openRaftLog(filepath.Join(dir, "raft.db"), n.disk); err != nil {
		return nil, err
	}
	if n.raftMetrics, err = raftMetrics(); err != nil {
		return nil, err
	}
	hlog := &raftLogger{Logger: hclog.NewNullLogger(), log: logger}
	if n.snaps, err = openSnapshots(dir, hlog, n.halt); err != nil {
		return nil, err
	}
	has, err := raft.HasExistingState(n.logs, n.logs, n.snaps)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", n.logs.path, err)
	}
	newest := uint64(0)
	if metas, err := n.snaps.List(); err != nil {
		return nil, fmt.Errorf("list %s/snapshots: %w", dir, err)
	} else if len(metas) > 0 {
		newest = metas[0].Index
	}
	last, err := n.logs.LastIndex()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", n.logs.path, err)
	}
	// raft takes a snapshot in some term only, and notes that first.
	if _, err := n.logs.GetUint64([]byte("CurrentTerm")); newest > 0 && err != nil {
		return nil, fmt.Errorf("%s holds no term, but there are snapshots: raft's log was lost; %s (%w)", n.logs.path, rejoinEmpty, err)
	}
	if at := st.at().index; at > max(last, newest) {
		return nil, fmt.Errorf("%s/state.db is at raft index %d, but raft's log and snapshots end at %d: part of the directory was lost; "+
			"move it away and start again, and the node rejoins empty", dir, at, max(last, newest))
	}
	if err := n.readIdentity(has); err != nil {
		return nil, err
	}

	n.port = newPort(n.id, ln, nil, logger)
	if err := n.reckon(); err != nil {
		return nil, fmt.Errorf("%w; %s", err, rebuildState)
	}
	n.logs.stored = n.noteLogged
	if err := n.findLogged(max(st.at().index, newest)); err != nil {
		return nil, fmt.Errorf("read %s: %w", n.logs.path, err)
	}
	if err := n.setSecrets(cfg.secrets); err != nil {
		return nil, err
	}
	go n.port.accept()
	start := func(servers []raft.Server) error { return n.startRaft(newest, servers, hlog) }
	n.tasks.Go(n.serveAsks)
	n.tasks.Go(n.disk.watch)
	if has {
		if err := start(nil); err != nil {
			return nil, err
		}
		return n, nil
	}
	n.tasks.Go(func() error {
		servers, err := n.join()
		if err == nil {
			err = start(servers)
		}
		if err != nil && n.ctx.Err() == nil {
			n.halt(err)
		}
		return nil
	})
	return n, nil
}

// setSecrets makes these the cluster's secrets for this node: the first is shown and all are
// accepted, by new connections from now on; none is plain text. Connections by a secret that is not
// among them are closed. The others end as soon as they are idle, so that those by a secret that is
// shown no longer are gone before it is taken away. On an error nothing changes.
func (n *raftNode) setSecrets(secrets []secret) error {
	ring, err := newKeyring(secrets, n.id)
	if err != nil {
		return err
	}
	if n.asker.Load() == nil || !reflect.DeepEqual(ring, n.port.ring.Load()) {
		n.port.setRing(ring)
		for clients, idle := range map[*atomic.Pointer[http.Transport]]int{&n.asker: 8, &n.forwards: maxForwards} {
			next := newAsker(n.port, idle)
			if clients == &n.forwards {
				next.MaxConnsPerHost = maxForwards
			}
			// One whose idle connections were closed keeps none that becomes idle, until it is used.
			if old := clients.Swap(next); old != nil {
				old.CloseIdleConnections()
			}
		}
	}
	if ring == nil {
		n.cfg.warnPlaintext(n.log)
	}
	return nil
}

// maxForwards is how many writes are on their way to the leader at once; others wait. It is well below
// maxStrangers: else a burst of writes would push this node's new connections out of the leader's port,
// raft's among them.
const maxForwards = maxStrangers / 2

// transport is how the nodes talk to each other, as /health/ready calls it.
func (n *raftNode) transport() string {
	if n.port.ring.Load() == nil {
		return "plaintext"
	}
	return "tls"
}

// maxPool is how many idle connections raft keeps to each node.
const maxPool = 4

// startRaft starts raft itself; newest is the index of the newest snapshot. servers, if
// any, are the members that a cluster which is new begins with.
func (n *raftNode) startRaft(newest uint64, servers []raft.Server, hlog hclog.Logger) error {
	n.port.open.Store(true)
	n.trans = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: raftStream{n.port},
		Logger: hlog,
		// One request in flight: pipelining can wedge on a rejected append while heartbeats
		// look healthy (hashicorp/raft issue 612), and measured here it gains nothing.
		MaxRPCsInFlight: 1,
		MaxPool:         maxPool,
		// Long enough for a batch of large values on a slow disk; elections do not wait for it.
		Timeout: 10 * time.Second,
	})
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(n.id)
	conf.Logger = hlog
	// A follower that hears nothing from its leader for this long, or up to twice as long, stands
	// for election, and a leader that hears nothing from a majority steps down: short enough that
	// a dead leader is replaced within a second, long enough for a disk or a scheduler that
	// stalls for a moment. A smaller setting is honoured.
	conf.HeartbeatTimeout = time.Duration(n.cfg.Cluster.LowerElectionTimeout) * time.Millisecond
	conf.ElectionTimeout = conf.HeartbeatTimeout
	conf.LeaderLeaseTimeout = conf.HeartbeatTimeout
	// Followers learn of a commit with the next append, at latest after twice this: 10 ms.
	conf.CommitTimeout = 5 * time.Millisecond
	// An append carries as many entries at once to a follower that is behind, and Apply takes as many
	// in a transaction. Writers that wait together share an entry already (see propose.go), which
	// may have a megabyte: so many of those pass a slow network within the transport's timeout.
	conf.MaxAppendEntries = 32
	// takeSnapshots decides when, by bytes and count, and how much log stays; not raft.
	conf.SnapshotInterval = time.Hour
	conf.SnapshotThreshold = 1 << 62
	conf.TrailingLogs = trailingLogs
	// A state file that holds the newest snapshot need not be made from it again.
	conf.NoSnapshotRestoreOnStart = n.store.at().index >= newest
	conf.ShutdownOnRemove = false // a removed node says so and stays up, not ready
	conf.NoLegacyTelemetry = true

	// Replication reads what was just appended from memory: a few appends, of up to a megabyte an entry.
	var err error
	if n.recent, err = raft.NewLogCache(64, n.logs); err != nil {
		return err
	}
	trans := guardTransport(n.trans, n.disk, n.log, n.follows, n.stranger)
	if servers != nil {
		if err := raft.BootstrapCluster(conf, n.recent, n.logs, n.snaps, trans, raft.Configuration{Servers: servers}); err != nil {
			return fmt.Errorf("bootstrap %s: %w", n.logs.path, err)
		}
	}
	if err := n.markUsed(); err != nil { // before the first vote
		return err
	}
	var r *raft.Raft
	err = caught(func() (err error) {
		r, err = raft.NewRaft(conf, &fsm{store: n.store, log: n.log, disk: n.disk, halt: n.halt}, n.recent, n.logs, n.snaps, trans)
		return err
	})
	if err != nil {
		return fmt.Errorf("start raft in %s: %w; if a file is damaged, %s", n.dir, err, rejoinEmpty)
	}
	r.RegisterObserver(raft.NewObserver(nil, false, func(o *raft.Observation) bool {
		if l, ok := o.Data.(raft.LeaderObservation); ok && l.LeaderID != "" {
			n.leaders.Add(1)
		}
		return false
	}))
	n.logs.mark()
	n.raft.Store(r)
	n.tasks.Go(n.sayApplied)
	n.tasks.Go(n.watchLeadership)
	n.tasks.Go(n.runProposals)
	n.tasks.Go(n.takeSnapshots)
	n.tasks.Go(n.keepFresh)
	n.tasks.Go(n.keepRoster)
	n.tasks.Go(n.keepVoters)
	n.tasks.Go(n.compareHashes)
	n.tasks.Go(n.keepTrail)
	return nil
}

// sayApplied logs how long it took, from the process's start on, until the state had all that was
// committed of the log that the node began with, where it lacked some.
func (n *raftNode) sayApplied() error {
	r := n.raft.Load()
	had, last := n.store.at().index, r.LastIndex()
	for e := new(raft.Log); last > had; last-- { // to the last one that the state hears of
		if err := n.logs.GetLog(last, e); err != nil || e.Type == raft.LogCommand || e.Type == raft.LogConfiguration {
			break
		}
	}
	for n.store.at().index < last {
		select {
		case <-n.ctx.Done():
			return nil
		case <-time.After(askPause): // the pace of the question
		}
	}
	if had < last && last > 1 { // 1 holds the members of a new cluster
		n.log.Info("log applied", "from", had, "to", last, "revision", n.store.at().rev, "took", time.Since(n.began))
	}
	return nil
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
	r := n.raft.Load()
	for {
		select {
		case <-n.ctx.Done():
			return nil
		case leads := <-r.LeaderCh():
			n.led.Store(0)
			n.store.changed.ring() // who asks a leader that is no more looks again, see leaderRevision
			if !leads {
				continue
			}
			term, before := r.CurrentTerm(), r.CommitIndex()
			// Behind this barrier the state holds every write that any leader acknowledged:
			// an entry of the own term is committed, and all before it is applied.
			if err := r.Barrier(0).Error(); err != nil {
				n.log.Warn("leadership lost before it began", "term", term, "error", err)
				continue
			}
			if r.CurrentTerm() == term {
				n.quietTo(before)
				n.led.Store(term)
				n.log.Info("leading", "term", term, "revision", n.store.at().rev)
				n.tasks.Go(n.unstageOthers)
			}
		}
	}
}

// leads reports whether raft takes this node for the leader and it has caught up with its
// predecessors. It may have been replaced already.
func (n *raftNode) leads() bool {
	r := n.raft.Load()
	return r != nil && r.State() == raft.Leader && n.led.Load() == r.CurrentTerm()
}

// follows reports whether this node follows a leader in a term, and the last index of its log.
func (n *raftNode) follows(leader string, term uint64) (last uint64, ok bool) {
	r := n.raft.Load()
	if r == nil || r.State() != raft.Follower || r.CurrentTerm() != term {
		return 0, false
	}
	_, id := r.LeaderWithID()
	return r.LastIndex(), string(id) == leader
}

// leader returns the id and the API's base URL of the leader that this node knows,
// or "". The address is the roster's, never from a request: a client's key follows a redirect.
func (n *raftNode) leader() (id, api string) {
	r := n.raft.Load()
	if r == nil {
		return "", ""
	}
	_, sid := r.LeaderWithID()
	id = string(sid)
	m, ok := (*n.port.peers.Load())[id]
	if !ok {
		return "", ""
	}
	return id, m.api
}

// role is what /health/ready calls the node.
func (n *raftNode) role() string {
	r := n.raft.Load()
	switch {
	case r == nil:
		return "nonvoter"
	case r.State() == raft.Leader:
		return "leader"
	case r.State() == raft.Candidate:
		return "candidate"
	}
	if s, ok := n.server(n.id); ok && s.Suffrage == raft.Voter {
		return "follower"
	}
	return "nonvoter"
}

// term is raft's current term, 0 before raft has started.
func (n *raftNode) term() uint64 {
	if r := n.raft.Load(); r != nil {
		return r.CurrentTerm()
	}
	return 0
}

// propose fills in who asks and proposes the command.
func (s *server) propose(c *call, cmd *command) (*result, error) {
	return s.proposeUntil(c, cmd, c.deadline())
}

// proposeUntil is propose with a deadline of its own.
func (s *server) proposeUntil(c *call, cmd *command, deadline time.Time) (*result, error) {
	if grows(cmd) && s.node.disk.lowForLeader() {
		return nil, errNoSpace.because("the leader's disk is nearly full: free some space or raise the volume; deletes still work")
	}
	cmd.Actor, cmd.Source, cmd.ID = c.who.principal, c.source(), c.id
	res, err := s.node.propose(cmd, deadline)
	if res != nil {
		c.sawRevision(max(res.rev, s.store.at().rev))
	}
	if err != nil {
		return nil, err
	}
	return res, nil
}

// grows reports whether a command adds anything but the events of what it removes.
func grows(cmd *command) bool {
	return cmd.Op != "drop" && (cmd.Op == "describe" || cmd.Restore != nil || slices.ContainsFunc(cmd.Changes, func(c change) bool { return c.Value != nil }))
}

// handOver gives leadership away, if this node has it and another can take it. The error, which the
// log has, says that it has it still.
func (n *raftNode) handOver() error {
	r := n.raft.Load()
	if r == nil || r.State() != raft.Leader {
		return nil
	}
	err := n.within(r.LeadershipTransfer())
	if err != nil {
		n.log.Warn("leadership not handed over", "error", err)
	}
	return err
}

// Close ends raft. The store is not used by it afterwards.
func (n *raftNode) Close() error {
	n.stop()
	err := n.tasks.Wait() // first: one of them may be about to start raft
	if r := n.raft.Load(); r != nil {
		over := r.Shutdown()
		// And with it the port. Shutdown waits for what this node has asked others, and one that stops too
		// waits for what it has asked here: they are told that there is no answer.
		n.trans.Close()
		err = errors.Join(err, over.Error())
	} else {
		n.port.Close()
	}
	if cerr := n.logs.Close(); err == nil {
		err = cerr
	}
	return err
}

// trailingLogs is how many entries stay in the log behind a snapshot, so that a follower that
// was away for a moment needs no snapshot.
const trailingLogs = 8192

// takeSnapshots writes a snapshot, which lets the log be cut, when the log since the last one has
// as many entries or bytes as a restart replays in a second or so, and a quarter of the state's
// bytes: so the cost of copying the state is spread over as many writes as it is large.
func (n *raftNode) takeSnapshots() error {
	const (
		snapshotEntries = 8192
		snapshotBytes   = 4 << 20
		snapshotMost    = 1 << 20 // entries after which the state's size does not matter
		// A patch of many small values is short in the log and long in the state.
		snapshotGrowth = 64 << 20
	)
	r := n.raft.Load()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	said, was := false, int64(n.disk.state.Load()) // was: the state's size at the snapshot before
	for {
		select {
		case <-n.ctx.Done():
			return nil
		case <-tick.C:
		}
		entries, size := n.logs.grown()
		state := int64(n.disk.state.Load())
		if entries < snapshotEntries && size < snapshotBytes || size < state/4 && entries < snapshotMost && state-was < was/4+snapshotGrowth {
			continue
		}
		// One that fills the disk takes the room from the log and the state, and so ends the node.
		if n.disk.free.Load() < n.disk.state.Load()+n.disk.floor {
			if !said {
				n.log.Error("snapshot not taken", "error", "the disk has no room for it", "free", n.disk.free.Load(), "size", state)
			}
			said = true
			n.snapshots.failed.Add(1)
			continue
		}
		said, was = false, state
		n.logs.mark()
		// An entry may be large. Of the log, no more bytes stay than make an eighth of the state.
		keep := uint64(trailingLogs)
		if mean := size / entries; mean > 0 {
			keep = min(keep, max(uint64(max(snapshotBytes/2, state/8)/mean), 16))
		}
		rc := r.ReloadableConfig()
		rc.TrailingLogs = keep
		if err := r.ReloadConfig(rc); err != nil {
			n.log.Error("trailing logs not set", "error", err)
		}
		switch err := r.Snapshot().Error(); {
		case err == nil:
			n.snapshots.taken.Add(1)
		case errors.Is(err, raft.ErrNothingNewToSnapshot), errors.Is(err, raft.ErrRaftShutdown):
		case strings.HasPrefix(err.Error(), "cannot take snapshot now"): // members change; it is due still
			n.logs.add(entries, size)
		default:
			n.snapshots.failed.Add(1)
			n.log.Error("snapshot not taken", "error", err)
			n.logs.add(entries, size)
		}
	}
}

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
