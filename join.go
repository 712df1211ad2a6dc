package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// A node whose directory was lost looks like a new one, and would vote with an empty log for
// a leader that lacks what it had itself acknowledged. So an empty node does not start raft, for
// even an unconfigured raft grants votes, before it has found out which of two it is:
//
//   - one of a cluster that is new: then it bootstraps with the same members as all others;
//   - one of a cluster that holds data: then the leader must take its vote away first, and that
//     must be committed. It then starts without a vote, is caught up, and gets its vote back.
//
// A node that is new in an old cluster comes in by the second way: started with -join, it never takes
// itself for one of a new cluster, and the leader lets it in once somebody has added it.
//
// Nodes that start together see each other turn from empty to formed. What tells a fresh
// cluster from an old one is the directories' identities: a number drawn when the directory is
// made, in the file identity. A node that bootstraps notes in the file formed whose empty
// directories it had seen by then. Whoever is asked by one of those knows that it was never
// more than empty.

// The file identity holds a number and one of these words.
const (
	identityFresh = "fresh" // raft has never started in this directory
	identityUsed  = "used"
)

// readIdentity reads the directory's identity or draws one; hasState says that raft has state.
// A directory that raft had used, and whose raft state is gone, is another one now.
func (n *raftNode) readIdentity(hasState bool) error {
	path := filepath.Join(n.dir, "identity")
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	num, word, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	id, perr := strconv.ParseUint(num, 10, 64)
	if perr != nil || !hasState && word != identityFresh {
		var raw [8]byte
		rand.Read(raw[:])
		id, word = binary.BigEndian.Uint64(raw[:]), identityFresh
		if err := os.Remove(filepath.Join(n.dir, "formed")); err != nil && !os.IsNotExist(err) {
			return err
		}
		if err := writeFileSync(path, fmt.Appendf(nil, "%d %s\n", id, word)); err != nil {
			return err
		}
	}
	n.identity = id
	if hasState {
		formed := map[string]uint64{}
		if b, err := os.ReadFile(filepath.Join(n.dir, "formed")); err == nil {
			// One that cannot be read names nobody, which is the safe side.
			json.Unmarshal(b, &formed)
		}
		n.formed.Store(&formed)
	}
	return nil
}

// becomeUsed notes that raft is about to start here, in a cluster that these nodes formed. That the
// directory is used is noted when raft has its members: a node that is killed between would
// not know itself again.
func (n *raftNode) becomeUsed(formed map[string]uint64) error {
	b, err := json.Marshal(formed)
	if err != nil {
		return err
	}
	if err := writeFileSync(filepath.Join(n.dir, "formed"), b); err != nil {
		return err
	}
	n.formed.Store(&formed) // from now on this node answers that it has data
	return nil
}

// markUsed notes that raft has state here, or is about to vote.
func (n *raftNode) markUsed() error {
	return writeFileSync(filepath.Join(n.dir, "identity"), fmt.Appendf(nil, "%d %s\n", n.identity, identityUsed))
}

// What a node answers to /state?node=ID&identity=N.
const (
	stateEmpty      = 0 // raft has no state here
	stateData       = 1 // it has, and the asker may have had part in it
	stateFormedWith = 2 // it has, from a formation that saw the asker's directory empty
)

// stateFor answers a node that asks what this one holds.
func (n *raftNode) stateFor(id string, identity uint64) uint64 {
	formed := n.formed.Load()
	switch {
	case formed == nil:
		return stateEmpty
	case identity != 0 && (*formed)[id] == identity:
		return stateFormedWith
	}
	return stateData
}

const (
	// formMoment is how long an empty node waits for all others to answer before a majority is
	// enough.
	formMoment = 3 * time.Second
	askPause   = 100 * time.Millisecond
)

// join finds out how this empty node may start raft: with the members of a new cluster, or
// with none, when the leader of the one that is there has made it a member without a vote.
func (n *raftNode) join() ([]raft.Server, error) {
	filed := make([]string, 0, len(n.cfg.Cluster.Nodes))
	for _, m := range n.cfg.Cluster.Nodes {
		filed = append(filed, m.Id)
	}
	slices.Sort(filed)
	others := slices.DeleteFunc(slices.Clone(filed), func(id string) bool { return id == n.id })
	began, told := time.Now(), ""
	for {
		called := time.Since(time.Unix(0, n.port.calledAt.Load())) < formMoment
		empty, holder, formed := n.askStates(others)
		if holder != "" {
			// Its file may not list the leader.
			ctx, cancel := context.WithTimeout(n.ctx, roundTime)
			removed, err := n.learn(ctx, holder)
			cancel()
			if err != nil {
				n.log.Debug("members not learned", "error", err)
			}
			n.say(&told, n.waiting(holder, removed))
			question := fmt.Sprintf("/rejoin?node=%s&identity=%d", n.id, n.identity)
			if n.cfg.join {
				question += "&join"
			}
			for _, id := range sortedKeys(n.roster.Load().nodes) {
				if id == n.id {
					continue
				}
				ctx, cancel := context.WithTimeout(n.ctx, 2*n.cfg.requestTimeout())
				_, err := n.ask(ctx, id, question, 1)
				cancel()
				if err == nil {
					n.log.Info("rejoining without a vote", "leader", id)
					return nil, n.becomeUsed(map[string]uint64{})
				}
			}
		} else if n.cfg.join {
			n.say(&told, "started with -join: waiting until a node of the cluster answers, one of Cluster.Nodes that has data")
		} else if called && !formed {
			// Whoever has formed a cluster with this node calls it only afterwards, and says so when asked.
			n.say(&told, "a node that is not in Cluster.Nodes takes this one for a member of its cluster: list that cluster's other nodes there, or start those of them that are listed")
		} else if len(empty) == len(filed) || len(empty) > len(filed)/2 && time.Since(began) > formMoment {
			n.log.Info("forming a new cluster", "empty", len(empty), "nodes", len(filed))
			var servers []raft.Server
			for _, id := range filed {
				// Raft remembers votes by address bytes. Ours are node ids, which are unique, and dial
				// finds the host behind one: no two nodes look like one, whatever they listen on.
				servers = append(servers, raft.Server{ID: raft.ServerID(id), Address: raft.ServerAddress(id)})
			}
			return servers, n.becomeUsed(empty)
		} else {
			n.say(&told, "this node's directory is empty: waiting until the other nodes have said whether they have data")
		}
		select {
		case <-n.ctx.Done():
			return nil, n.ctx.Err()
		case <-time.After(askPause): // the pace of the question
		}
	}
}

// waiting is why this node waits where another has data.
func (n *raftNode) waiting(holder string, removed bool) string {
	me := n.cfg.self()
	put := fmt.Sprintf(`PUT /api/v1/cluster/nodes/%s {"address":"%s","apiPort":%d,"raftPort":%d}`, me.Id, me.Address, me.ApiPort, me.RaftPort)
	switch {
	case removed:
		return "this node was removed from the cluster: waiting until it is added again, with " + put
	case n.cfg.join:
		return "started with -join: waiting until this node is added, with " + put
	}
	return "this node's directory is empty, but node " + holder + " has data: waiting until the leader has taken this node's vote away"
}

// say logs why the node waits, once for each reason, and tells readiness.
func (n *raftNode) say(told *string, why string) {
	if *told != why {
		*told = why
		n.waitsFor.Store(&why)
		if time.Since(n.began) > formMoment/4 {
			n.log.Warn(why)
		}
	}
}

// askStates asks the others what they hold. empty has those that hold nothing, or a cluster so
// fresh that it saw this directory empty, which formed reports, this node included; holder is one that
// has data.
func (n *raftNode) askStates(others []string) (empty map[string]uint64, holder string, formed bool) {
	empty = map[string]uint64{n.id: n.identity}
	ctx, cancel := context.WithTimeout(n.ctx, roundTime/2)
	defer cancel()
	var mu sync.Mutex // guards empty, holder and formed
	var wg sync.WaitGroup
	for _, id := range others {
		wg.Go(func() {
			nums, err := n.ask(ctx, id, fmt.Sprintf("/state?node=%s&identity=%d", n.id, n.identity), 2)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil: // silence is no answer
			case nums[0] == stateData, nums[0] == stateFormedWith && n.cfg.join:
				holder = id
			default:
				empty[id] = nums[1]
				formed = formed || nums[0] == stateFormedWith
			}
		})
	}
	wg.Wait()
	return empty, holder, formed
}

// rejoin lets a node whose directory is empty become a member without a vote. It returns when
// that is committed. Only the leader does it, and only for the node that answers under the id's
// own address. A node that is no member, but of this node's file, is recorded as one, unless it joins:
// that was started with -join, and somebody is to add it.
func (n *raftNode) rejoin(ctx context.Context, id string, identity uint64, joins bool) error {
	n.rejoins.Lock()
	defer n.rejoins.Unlock()
	if !n.leads() {
		return errNotLeading
	}
	rec, recorded := n.roster.Load().records[id]
	filed, ok := n.filed(id)
	_, member := n.server(id)
	switch {
	case id == n.id || recorded && rec.Removed:
		return fmt.Errorf("node %s was removed from the cluster", id)
	case !recorded && !member && (!ok || joins):
		return fmt.Errorf("node %s was not added to the cluster", id)
	}
	nums, err := n.ask(ctx, id, fmt.Sprintf("/state?node=%s&identity=0", n.id), 2)
	if err != nil {
		return err
	}
	if nums[0] != stateEmpty || nums[1] != identity {
		return fmt.Errorf("another node answers under the address of node %s", id)
	}
	if !recorded && !member {
		add := &command{Op: "member", Node: &filed, Known: n.known(), Actor: "confman", ID: rand.Text()}
		if _, err := n.propose(add, time.Now().Add(n.cfg.requestTimeout())); err != nil {
			return err
		}
		n.log.Warn("a node of the configuration file was no member, and is added", "member", id)
		if err := n.reckon(); err != nil {
			return err
		}
	}
	r := n.raft.Load()
	var change raft.IndexFuture
	members := r.GetConfiguration()
	for _, s := range members.Configuration().Servers {
		if string(s.ID) != id {
			continue
		}
		if s.Suffrage != raft.Voter {
			_, err := n.behindLog(ctx) // it may have been demoted a moment ago: see that committed
			return err
		}
		n.log.Warn("a node came back empty: its vote is taken away until it has caught up", "member", id)
		change = r.DemoteVoter(s.ID, members.Index(), n.cfg.requestTimeout())
	}
	if change == nil {
		change = r.AddNonvoter(raft.ServerID(id), raft.ServerAddress(id), members.Index(), n.cfg.requestTimeout())
	}
	return n.within(change)
}
