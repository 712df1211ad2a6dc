package main

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// A proposal is one command on its way into raft's log. Commands that wait together share a
// log entry, and so its fsyncs, its messages and its place in a transaction.
type proposal struct {
	cmd   *command
	state atomic.Int32 // waiting, then either proposed or abandoned
	done  chan outcome // has room for the one that comes
}

const (
	waiting   = iota
	proposed  // it may be in the log
	abandoned // its time was over before it was proposed, so it never will be
)

// An outcome is what became of a proposal.
type outcome struct {
	res *result
	err error
}

const (
	// entriesInFlight are how many entries this node proposes before the first is applied: one
	// on its way while the next is put together. More would be smaller, and cost more each.
	entriesInFlight = 2
	// sharedCommands and sharedBytes bound what one entry holds.
	sharedCommands = 256
	sharedBytes    = 1 << 20
)

// errLate is the outcome of a command whose time was over before it was proposed, or before raft
// appended it.
var errLate = errUnavailable.because("the request waited too long to be proposed; try again")

const settleIt = "repeat it conditionally, or settle it by its correlation id in the audit trail"

// propose commits a command and returns what applying it gave. It gives up at the
// deadline. Any error says what became of the command: errUnknown that it may or may not be
// applied, now or later; any other that it is not and will not be.
func (n *raftNode) propose(cmd *command, deadline time.Time) (*result, error) {
	cmd.Until = deadline.UnixNano()
	start := time.Now()
	p := &proposal{cmd: cmd, done: make(chan outcome, 1)}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case n.proposals <- p:
	case <-timer.C:
		return nil, errLate
	}
	select {
	case o := <-p.done:
		if o.err != nil {
			return nil, o.err
		}
		n.committed.observe(time.Since(start))
		return o.res, o.res.err
	case <-timer.C:
	}
	if p.state.CompareAndSwap(waiting, abandoned) || p.state.Load() == abandoned {
		return nil, errLate
	}
	return nil, errUnknown.because("no majority confirmed the write in time; it may or may not be made: %s", settleIt)
}

// runProposals puts commands into the log until the node stops.
func (n *raftNode) runProposals() error {
	room := make(chan struct{}, entriesInFlight)
	for {
		select {
		case room <- struct{}{}:
		case <-n.ctx.Done():
			return nil
		}
		// While it waits here for a first command there is room; while it waited for room, commands
		// have gathered.
		batch, data, err := n.gather()
		if batch == nil {
			return nil
		}
		if err != nil || len(data) == 0 {
			for _, p := range batch {
				p.done <- outcome{err: err}
			}
			<-room
			continue
		}
		f := n.raft.Load().Apply(data, n.cfg.requestTimeout())
		go func() {
			settle(batch, f) // a future has no clock of its own, but those who wait do
			<-room
		}()
	}
}

// gather takes the commands that wait, at least one, and encodes them; nil when the node stops.
func (n *raftNode) gather() ([]*proposal, []byte, error) {
	var batch []*proposal
	data := make([]byte, 4, 1024)
	take := func(p *proposal) error {
		if time.Now().UnixNano() > p.cmd.Until {
			if p.state.CompareAndSwap(waiting, abandoned) {
				p.done <- outcome{err: errLate}
			}
			return nil
		}
		if !p.state.CompareAndSwap(waiting, proposed) {
			return nil
		}
		batch = append(batch, p)
		p.cmd.At = time.Now().UnixNano()
		var err error
		data, err = p.cmd.appendTo(data)
		return err
	}
	for len(batch) == 0 {
		select {
		case p := <-n.proposals:
			if err := take(p); err != nil {
				return batch, nil, err
			}
		case <-n.ctx.Done():
			return nil, nil, nil
		}
	}
	for len(batch) < sharedCommands && len(data) < sharedBytes {
		select {
		case p := <-n.proposals:
			if err := take(p); err != nil {
				return batch, nil, err
			}
			continue
		default:
		}
		break
	}
	return batch, sealCommands(data), nil
}

// settle waits for an entry and tells everyone in it what became of his command.
func settle(batch []*proposal, f raft.ApplyFuture) {
	err := f.Error()
	var results []*result
	switch {
	case err == nil:
		// What the FSM refuses comes here too; nil is an entry that it did not see.
		results, _ = f.Response().([]*result)
		if len(results) != len(batch) {
			err = errUnknown.because("the write was committed, but this node cannot say what became of it: read the key")
		}
	case errors.Is(err, raft.ErrNotLeader):
		err = errNoLeader.because("this node ceased to lead before it proposed the write; try again")
	case errors.Is(err, raft.ErrLeadershipTransferInProgress), errors.Is(err, raft.ErrEnqueueTimeout):
		err = errUnavailable.because("leadership is being handed over; try again")
	default:
		err = &problem{kind: errUnknown, cause: err,
			detail: "leadership was lost with the write in flight; it may or may not be made: " + settleIt}
	}
	for i, p := range batch {
		if err != nil {
			p.done <- outcome{err: err}
		} else {
			p.done <- outcome{res: results[i]}
		}
	}
}
