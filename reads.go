package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/singleflight"
)

// What a read promises rests on one question: what revision has the leader, while it
// still leads? Contact with a leader does not answer it. Heartbeats do not say how far
// the log has come, and a leader that was paused may have been replaced without knowing.

// errNotLeading is why a node cannot confirm that it leads.
var errNotLeading = errors.New("this node does not lead")

// A shared call lets everyone who waits for an answer share one that was begun after
// they all asked. One runs at a time; who comes while it runs shares the next.
type shared struct {
	flight singleflight.Group
	mu     sync.Mutex // held while a call runs
}

// do runs f for all who wait together. It stops waiting when ctx ends; f does not.
func (s *shared) do(ctx context.Context, f func() (uint64, error)) (uint64, error) {
	ch := s.flight.DoChan("", func() (any, error) {
		s.mu.Lock() // until here, whoever comes joins this call: it has not begun
		defer s.mu.Unlock()
		s.flight.Forget("")
		rev, err := f()
		return rev, err
	})
	select {
	case r := <-ch:
		rev, _ := r.Val.(uint64)
		return rev, r.Err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// confirmLeadership is how a leader makes sure that it still leads. It is a variable so
// that a test can show what a weaker way does.
var confirmLeadership = (*raftNode).askMajority

// confirmed makes sure that this node leads and that its state holds every write that was
// acknowledged before the call, by whatever leader (the Raft thesis, section 6.4): all that earlier
// leaders committed was applied before led was set, this leader acknowledges a write only after it
// is applied, and a majority says after the call began that no later term has begun. It returns the
// raft index up to which the log was committed then.
func (n *raftNode) confirmed(ctx context.Context) (committed uint64, err error) {
	return n.rounds.do(ctx, func() (uint64, error) {
		asked := time.Now()
		term := n.led.Load()
		if !n.leads() {
			return 0, errNotLeading
		}
		committed := n.raft.Load().CommitIndex()
		if err := confirmLeadership(n, term); err != nil {
			return 0, err
		}
		if !n.leads() || n.led.Load() != term {
			return 0, errNotLeading
		}
		n.knownFresh(asked)
		return committed, nil
	})
}

// answer is what the leader, which this node must be, says to a question.
func (n *raftNode) answer(ctx context.Context, q question) (rev uint64, err error) {
	if q == complete {
		return n.behindLog(ctx)
	}
	committed, err := n.confirmed(ctx)
	if err == nil && q == readable {
		err = n.holds(ctx, committed)
	}
	return n.store.at().rev, err
}

// holds waits until this leader's state has what is committed of the log up to index: a follower may
// be ahead of it in applying. quiet is the last index up to which there was nothing to wait for.
func (n *raftNode) holds(ctx context.Context, index uint64) error {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.requestTimeout())
	defer cancel()
	for {
		bell := n.store.applied.wait()
		at := n.store.at().index
		if at >= index || n.quiet.Load() >= index {
			return nil
		}
		// raft's own entries, one for each term and each barrier, never come to the state. Up to quiet
		// there was nothing to wait for, and what is cut from the log is in a snapshot of the state, so
		// neither is looked at again.
		last, from, e := index, max(at, n.quiet.Load()), new(raft.Log)
		for ; last > from; last-- {
			if err := n.recent.GetLog(last, e); errors.Is(err, raft.ErrLogNotFound) {
				last = from
				break
			} else if err != nil {
				return err
			}
			if e.Type == raft.LogCommand || e.Type == raft.LogConfiguration {
				break
			}
		}
		if last <= from {
			n.quietTo(index)
			return nil
		}
		select {
		case <-bell:
		case <-ctx.Done():
			return fmt.Errorf("the state has not applied raft index %d in time", last)
		}
	}
}

// quietTo notes that the state has all that the log holds up to index.
func (n *raftNode) quietTo(index uint64) {
	for {
		old := n.quiet.Load()
		if old >= index || n.quiet.CompareAndSwap(old, index) {
			return
		}
	}
}

// roundTime bounds one question to another node.
const roundTime = time.Second

// askMajority asks the other voters for their term and returns nil as soon as a
// majority, this node included, is in the given one. A later leader needs the votes of a
// majority, one of which is of a node that had not yet voted when it answered here. raft
// does not tell of acknowledgements' ages, so VerifyLeader cannot be used: an answer that
// was in a socket while this process was paused would confirm it.
func (n *raftNode) askMajority(term uint64) error {
	votes := 0
	ctx, cancel := context.WithTimeout(context.Background(), roundTime)
	defer cancel() // a majority is enough; the others' answers are not waited for
	var others []string
	for _, s := range n.raft.Load().GetConfiguration().Configuration().Servers {
		if s.Suffrage != raft.Voter {
			continue
		}
		if string(s.ID) == n.id {
			votes++
		} else {
			others = append(others, string(s.ID))
		}
	}
	need := (len(others)+votes)/2 + 1
	if votes >= need {
		return nil
	}
	type reply struct {
		term uint64
		err  error
	}
	replies := make(chan reply, len(others))
	for _, id := range others {
		go func() {
			nums, err := n.ask(ctx, id, "/term", 1)
			if err != nil {
				replies <- reply{err: err}
				return
			}
			replies <- reply{term: nums[0]}
		}()
	}
	var errs []error
	for range others {
		r := <-replies
		switch {
		case r.err != nil:
			errs = append(errs, r.err)
			continue
		case r.term > term:
			return fmt.Errorf("%w any more: term %d has begun", errNotLeading, r.term)
		case r.term == term:
			votes++
		}
		if votes >= need {
			return nil
		}
	}
	return fmt.Errorf("no majority confirms term %d: %w", term, errors.Join(errs...))
}

// behindLog returns the leader's revision once everything that was in its log when the
// call came is applied. It costs a log entry; whoever waits shares it.
func (n *raftNode) behindLog(ctx context.Context) (uint64, error) {
	return n.barriers.do(ctx, func() (uint64, error) {
		if !n.leads() {
			return 0, errNotLeading
		}
		before := n.raft.Load().CommitIndex()
		f := n.raft.Load().Barrier(roundTime)
		done := make(chan error, 1)
		go func() { done <- f.Error() }()
		select {
		case err := <-done:
			if err == nil {
				n.quietTo(before)
			}
			return n.store.at().rev, err
		case <-time.After(n.cfg.requestTimeout()):
			return 0, errors.New("no majority confirmed the barrier in time")
		}
	})
}

// A question is what a node wants of the leader's state. The answer is a revision that the leader had,
// still leading, after the question came.
type question int

const (
	acknowledged question = iota // holds all that was acknowledged before
	readable                     // and all that any node has shown
	complete                     // and all that was in the leader's log
	questions                    // how many there are
)

// questionPaths are where nodes ask each other.
var questionPaths = [questions]string{"/acknowledged", "/revision", "/barrier"}

// leaderRevision asks the leader, which may be this node. The error is errNoLeader.
func (n *raftNode) leaderRevision(ctx context.Context, q question) (uint64, error) {
	for {
		id, _ := n.leader()
		if id == "" {
			return 0, errNoLeader.because("no leader is known; try again")
		}
		var rev uint64
		var err error
		if id == n.id {
			rev, err = n.answer(ctx, q)
		} else {
			rev, err = n.asking[q].do(ctx, func() (uint64, error) {
				ctx, cancel := context.WithTimeout(context.Background(), n.cfg.requestTimeout())
				defer cancel()
				// It may take its time to apply what it is asked for. One that is gone is not waited for.
				late := time.AfterFunc(roundTime, func() {
					for ctx.Err() == nil {
						if now, _ := n.leader(); now != id {
							cancel()
						}
						time.Sleep(askPause) // the pace of the question
					}
				})
				defer late.Stop()
				asked := time.Now()
				nums, err := n.ask(ctx, id, questionPaths[q], 2)
				if err != nil {
					return 0, err
				}
				n.leaderClock.Store(&clockReading{id, int64(nums[1]), time.Now()})
				if n.store.at().rev >= nums[0] {
					n.knownFresh(asked)
				}
				return nums[0], nil
			})
		}
		if err == nil {
			return rev, nil
		}
		// The leader may have changed since: ask the next one, while there is time.
		bell := n.store.changed.wait()
		if now, _ := n.leader(); now == "" || ctx.Err() != nil {
			return 0, &problem{kind: errNoLeader, detail: "the leader cannot be confirmed; try again", cause: err}
		}
		select {
		case <-bell:
		case <-time.After(20 * time.Millisecond): // the pace of the question
		case <-ctx.Done():
		}
	}
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

// A clockReading relates the leader's clock to this node's.
type clockReading struct {
	leader string
	nanos  int64     // the leader's clock, at some moment before here
	here   time.Time // this node's clock when the reading was here
}

// knownFresh notes that the state holds all that was acknowledged before t.
func (n *raftNode) knownFresh(t time.Time) {
	for {
		old := n.freshSince.Load()
		if old != nil && !t.After(*old) {
			return
		}
		if n.freshSince.CompareAndSwap(old, &t) {
			if old == nil {
				n.log.Info("caught up", "revision", n.store.at().rev, "took", time.Since(n.began))
			}
			return
		}
	}
}

// stalenessMs is an upper bound, in milliseconds, on how old a state is that holds all that was
// acknowledged before since; -1 where that is nil. The wall clock counts where it says more than
// the monotonic one, which stands still while the machine is suspended.
func stalenessMs(since *time.Time) int64 {
	if since == nil {
		return -1
	}
	now := time.Now()
	age := max(now.Sub(*since), now.Round(0).Sub(since.Round(0)), 0)
	return int64((age + time.Millisecond - 1) / time.Millisecond)
}

// keepFresh asks the leader, or as the leader the others, often enough that a plain read can
// be answered: five times within MaxStaleness, at least each second. It costs no log entry and
// nothing that a client does.
func (n *raftNode) keepFresh() error {
	pause := min(time.Duration(n.cfg.Cluster.MaxStaleness)*time.Millisecond/5, time.Second)
	quick := 20 * time.Millisecond // until the first answer, and after one that failed
	for {
		asked := time.Now()
		ctx, cancel := context.WithTimeout(n.ctx, max(roundTime, 5*pause))
		rev, err := n.leaderRevision(ctx, acknowledged)
		if err == nil && n.store.waitFor(ctx, rev) {
			n.knownFresh(asked)
		}
		cancel()
		wait := pause
		if err != nil || n.freshSince.Load() == nil {
			wait = quick
		}
		select {
		case <-n.ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// A read's form says how old its answer may be.
type readForm int

const (
	plainRead readForm = iota // at most MaxStaleness, shown again when the answer goes out
	staleRead
	consistentRead
)

// fresh makes sure that what the store holds from now on is as fresh as the read asks for:
// by ?consistent, ?stale and Confman-Min-Revision.
func (s *server) fresh(c *call) error {
	if v := c.r.Header["Confman-Min-Revision"]; v != nil {
		rev, err := strconv.ParseUint(v[0], 10, 64)
		if err != nil || len(v) > 1 {
			return errBadRequest.because("Confman-Min-Revision must be one whole number")
		}
		if s.store.at().rev < rev {
			ctx, cancel := context.WithTimeout(c.r.Context(), s.cfg.requestTimeout())
			defer cancel()
			if !s.store.waitFor(ctx, rev) {
				return errBehind.because("this node has not applied revision %d in time; it is at %d", rev, s.store.at().rev)
			}
		}
	}
	switch {
	case c.q.Has("consistent"):
		c.form = consistentRead
		ctx, cancel := context.WithTimeout(c.r.Context(), s.cfg.requestTimeout())
		defer cancel()
		q := readable
		if c.settles() { // by the trail
			q = complete
		}
		rev, err := s.node.leaderRevision(ctx, q)
		if err != nil {
			return err
		}
		if !s.store.waitFor(ctx, rev) {
			return errBehind.because("this node has not applied the leader's revision %d in time; it is at %d", rev, s.store.at().rev)
		}
	case c.q.Has("stale"):
		c.form = staleRead
	}
	// Taken before the transaction begins: what is learned later is not of what it sees.
	c.reads, c.since = true, s.node.freshSince.Load()
	c.sawRevision(s.store.at().rev)
	return c.tooOld(stalenessMs(c.since))
}

// tooOld refuses a plain read that is ms old, -1 where that is unknown, and so older than promised.
func (c *call) tooOld(ms int64) error {
	if most := int64(c.s.cfg.Cluster.MaxStaleness); c.form == plainRead && (ms < 0 || ms > most) {
		return errStaleRead.because("this node cannot show that it is at most %d ms behind; read from another node, or with ?stale", most)
	}
	return nil
}

// showStaleness puts the bound in the answer. A plain read that is older than promised
// ends here: also when the process was paused since it began.
func (c *call) showStaleness() error {
	if !c.reads {
		return nil
	}
	ms := int64(0)
	if c.form != consistentRead {
		ms = stalenessMs(c.since)
	}
	if 0 <= ms && ms < int64(len(usualMs)) {
		c.w.Header()["Confman-Staleness-Ms"] = usualMs[ms]
	} else {
		c.w.Header()["Confman-Staleness-Ms"] = []string{strconv.FormatInt(ms, 10)}
	}
	return c.tooOld(ms)
}

// usualMs are the header's values for what a node's age is in between two answers of the leader, so
// that a read makes none.
var usualMs = func() (all [1200][]string) {
	for ms := range all {
		all[ms] = []string{strconv.Itoa(ms)}
	}
	return all
}()

// settles reports whether the read is of the trail, where unknown outcomes are settled.
func (c *call) settles() bool {
	return c.route.pattern == "/api/v1/audit/{ns}" || c.route.pattern == "/api/v1/audit"
}
