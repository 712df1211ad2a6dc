package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
)

// hardFloor is how many bytes must be free for entries that are no commands: without a leader's
// first one nobody leads, and not even reads go on.
const hardFloor = 16 << 20

// A guardedTransport stands between the network and raft. What would fill the disk it refuses before
// raft touches its log for it, since raft does not survive an append that fails half-way; what
// raft would take in beside its main loop it hands to that loop; and a vote it asks for again.
type guardedTransport struct {
	*raft.NetworkTransport
	rpcs chan raft.RPC
	// follows returns whether this node follows a leader in a term, and how far its log has come.
	follows func(leader string, term uint64) (last uint64, ok bool)
	// stranger returns why what a leader sends cannot be from one of this node's cluster; nil where it can.
	stranger func(rpc raft.RPC) error
}

// Consumer implements raft.Transport.
func (t *guardedTransport) Consumer() <-chan raft.RPC { return t.rpcs }

// SetHeartbeatHandler implements raft.Transport. raft's own handler is not used: it runs beside
// the main loop, and there a heartbeat of a later term changes the term under a leader that is
// about to append, who then puts an entry into his log under the term of his successor, at the
// index of another entry of that term (hashicorp/raft issue 695). Replicas that differ follow.
func (t *guardedTransport) SetHeartbeatHandler(func(raft.RPC)) {
	t.NetworkTransport.SetHeartbeatHandler(t.heartbeat)
}

// heartbeat answers a heartbeat that says nothing new at once, so that a follower whose main loop
// waits for its disk does not look dead; the loop hears of it if it is free. Any other
// heartbeat waits for the loop. It changes nothing itself.
func (t *guardedTransport) heartbeat(rpc raft.RPC) {
	req, ok := rpc.Command.(*raft.AppendEntriesRequest)
	if !ok {
		t.rpcs <- rpc
		return
	}
	if err := t.stranger(rpc); err != nil {
		rpc.Respond(&raft.AppendEntriesResponse{}, err)
		return
	}
	last, ok := t.follows(string(req.ID), req.Term)
	if !ok {
		t.rpcs <- rpc
		return
	}
	rpc.Respond(&raft.AppendEntriesResponse{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}, Term: req.Term, LastLog: last, Success: true,
	}, nil)
	select {
	case t.rpcs <- raft.RPC{Command: req, RespChan: make(chan raft.RPCResponse, 1)}:
	default: // it is busy, with the leader's entries most likely
	}
}

// again makes a call anew while it fails by a connection that its other end has closed. raft keeps
// some for later, and those to a node that was started again since are all broken: a vote that
// fails by that costs another election timeout. What is called may be done twice.
func again(call func() error) (err error) {
	for range maxPool + 1 {
		if err = call(); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			break
		}
	}
	return err
}

// RequestVote implements raft.Transport.
func (t *guardedTransport) RequestVote(id raft.ServerID, to raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return again(func() error { return t.NetworkTransport.RequestVote(id, to, args, resp) })
}

// RequestPreVote implements raft.WithPreVote.
func (t *guardedTransport) RequestPreVote(id raft.ServerID, to raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return again(func() error { return t.NetworkTransport.RequestPreVote(id, to, args, resp) })
}

// TimeoutNow implements raft.Transport.
func (t *guardedTransport) TimeoutNow(id raft.ServerID, to raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return again(func() error { return t.NetworkTransport.TimeoutNow(id, to, args, resp) })
}

// guardTransport puts the guard before raft. It runs as long as the process.
func guardTransport(inner *raft.NetworkTransport, d *disk, log *slog.Logger, follows func(string, uint64) (uint64, bool), stranger func(raft.RPC) error) *guardedTransport {
	t := &guardedTransport{inner, make(chan raft.RPC), follows, stranger}
	go func() {
		refusing := false
		var told time.Time
		for rpc := range inner.Consumer() {
			if leads(rpc) {
				if err := stranger(rpc); err != nil {
					if time.Since(told) > refusalPause {
						told = time.Now()
						log.Error("a node of another cluster would lead this one, and is refused: "+
							"stop that node, move its data directory away and start it with an empty one",
							"from", string(rpc.Command.(raft.WithRPCHeader).GetRPCHeader().ID), "error", err)
					}
					refuse(rpc, err)
					continue
				}
			}
			low := d.low()
			// A snapshot is stored, and then made the state beside the old one.
			if cmd, ok := rpc.Command.(*raft.InstallSnapshotRequest); ok {
				low = low || d.free.Load() < d.floor+2*uint64(cmd.Size)
			}
			if low != refusing {
				refusing = low
				if low {
					log.Error("disk is nearly full: entries are refused", "free", d.free.Load(), "minimum", d.floor)
				} else {
					log.Info("disk has room again", "free", d.free.Load())
				}
			}
			if !low {
				t.rpcs <- rpc
				continue
			}
			full := fmt.Errorf("%s has %d bytes free, less than Storage.MinFreeMiB", d.dir, d.free.Load())
			switch cmd := rpc.Command.(type) {
			case *raft.AppendEntriesRequest:
				if slices.ContainsFunc(cmd.Entries, func(e *raft.Log) bool { return e.Type == raft.LogCommand }) || len(cmd.Entries) > 0 && d.free.Load() < hardFloor {
					rpc.Respond(&raft.AppendEntriesResponse{}, full)
					continue
				}
			case *raft.InstallSnapshotRequest:
				refuse(rpc, full)
				continue
			}
			t.rpcs <- rpc
		}
	}()
	return t
}

// leads reports whether it takes a leader to send this.
func leads(rpc raft.RPC) bool {
	switch rpc.Command.(type) {
	case *raft.AppendEntriesRequest, *raft.InstallSnapshotRequest, *raft.TimeoutNowRequest:
		return true
	}
	return false
}

// refuse answers an RPC that raft does not see.
func refuse(rpc raft.RPC, err error) {
	switch rpc.Command.(type) {
	case *raft.AppendEntriesRequest:
		rpc.Respond(&raft.AppendEntriesResponse{}, err)
	case *raft.TimeoutNowRequest:
		rpc.Respond(&raft.TimeoutNowResponse{}, err)
	case *raft.InstallSnapshotRequest:
		go func() {
			io.Copy(io.Discard, rpc.Reader) // the connection carries on behind it
			rpc.Respond(&raft.InstallSnapshotResponse{}, err)
		}()
	}
}

// stranger returns why what a leader sends cannot be from one of this node's cluster. A node that was made
// from a backup is the only one that has a vote until it has admitted others, and those of the cluster before
// may be there still, with their data, under the same ids: raft would take the one log for the other, and
// apply what follows to another state. So a node that alone has a vote follows nobody, as nobody else can
// lead then. Nor is anything that was applied taken back by a snapshot: no leader lacks it, but those of a
// cluster whose log is far behind where -restore begins.
func (n *raftNode) stranger(rpc raft.RPC) error {
	if cmd, ok := rpc.Command.(*raft.InstallSnapshotRequest); ok && cmd.LastLogIndex < n.store.at().index {
		return fmt.Errorf("a snapshot ends at index %d, and this node has applied %d", cmd.LastLogIndex, n.store.at().index)
	}
	for n.raft.Load() == nil { // what it is of is not known yet
		select {
		case <-n.ctx.Done():
			return n.ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	if all := n.voters(""); len(all) == 1 && all[0] == n.id {
		return fmt.Errorf("node %s alone has a vote in its cluster, and follows nobody", n.id)
	}
	return nil
}
