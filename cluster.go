package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/raft"
)

// A nodeRow is a node as /api/v1/cluster shows it. What only the node itself can say is, where it does
// not answer, as unreachable has it.
type nodeRow struct {
	ID            string `json:"id"`
	Address       string `json:"address"`
	APIPort       int    `json:"apiPort"`
	RaftPort      int    `json:"raftPort"`
	Role          string `json:"role"`  // as in /health/ready, or unreachable
	Voter         bool   `json:"voter"` // now, as the node that is asked knows
	Revision      uint64 `json:"revision"`
	Hash          string `json:"hash"`
	StalenessMs   int64  `json:"stalenessMs"`
	LastContactMs int64  `json:"lastContactMs"` // since it heard from a leader; 0 on the leader, -1 unknown
	Version       string `json:"version"`
	DiskFreeBytes int64  `json:"diskFreeBytes"`
}

// unreachable is the row of a node that does not answer.
var unreachable = nodeRow{Role: "unreachable", StalenessMs: -1, LastContactMs: -1, DiskFreeBytes: -1}

// A clusterView is the answer of /api/v1/cluster.
type clusterView struct {
	LeaderID string    `json:"leaderId"` // empty if unknown
	Term     uint64    `json:"term"`
	Revision uint64    `json:"revision"`
	Nodes    []nodeRow `json:"nodes"` // by id
}

// rowTime bounds how long a node is waited for that is to say how it is.
const rowTime = 500 * time.Millisecond

// row is what this node says of itself.
func (n *raftNode) row() nodeRow {
	pos := n.store.at()
	row := nodeRow{
		ID: n.id, Role: n.role(), Revision: pos.rev, Hash: hex.EncodeToString(pos.hash[:]),
		StalenessMs: stalenessMs(n.freshSince.Load()), LastContactMs: -1, Version: version(), DiskFreeBytes: int64(n.disk.free.Load()),
	}
	if r := n.raft.Load(); r != nil {
		if last := r.LastContact(); row.Role == "leader" {
			row.LastContactMs = 0
		} else if !last.IsZero() {
			row.LastContactMs = stalenessMs(&last)
		}
	}
	return row
}

// rowOf is a node as this one knows it and as it says itself, within rowTime.
func (n *raftNode) rowOf(ctx context.Context, id string) nodeRow {
	row := unreachable
	if id == n.id {
		row = n.row()
	} else {
		ctx, cancel := context.WithTimeout(ctx, rowTime)
		defer cancel()
		if said := unreachable; n.askFor(ctx, id, "/node", &said) == nil && said.ID == id {
			row = said
		}
	}
	rec := n.roster.Load().nodes[id]
	row.ID, row.Address, row.APIPort, row.RaftPort = id, rec.Address, rec.APIPort, rec.RaftPort
	s, ok := n.server(id)
	row.Voter = ok && s.Suffrage == raft.Voter
	return row
}

// getCluster answers who belongs to the cluster, and how each node is, asked now.
func (s *server) getCluster(c *call) error {
	n := s.node
	ids := map[string]bool{}
	for _, s := range n.servers() {
		ids[string(s.ID)] = true
	}
	ro := n.roster.Load()
	for id, rec := range ro.records {
		if !rec.Removed {
			ids[id] = true
		}
	}
	if len(ids) == 0 { // it has not begun
		for id := range ro.nodes {
			ids[id] = true
		}
	}
	rows := make([]chan nodeRow, 0, len(ids))
	for _, id := range sortedKeys(ids) {
		row := make(chan nodeRow, 1)
		rows = append(rows, row)
		go func() { row <- n.rowOf(c.r.Context(), id) }()
	}
	c.waited = true // for those that do not answer
	v := clusterView{Term: n.term(), Revision: s.store.at().rev, Nodes: make([]nodeRow, 0, len(rows))}
	v.LeaderID, _ = n.leader()
	for _, row := range rows {
		v.Nodes = append(v.Nodes, <-row)
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return c.sendJSON(http.StatusOK, b)
}

// order is held by a request that changes the membership: each is decided by what the one before it
// has left. It is waited for until ctx is over.
func (n *raftNode) order(ctx context.Context) (release func(), err error) {
	select {
	case n.ordering <- struct{}{}:
		return func() { <-n.ordering }, nil
	case <-ctx.Done():
		return nil, errUnavailable.because("another change of the membership is under way; try again")
	}
}

// nodeOf reads the id in the path.
func (c *call) nodeOf() (string, error) {
	id := c.r.PathValue("id")
	if !nodeID.MatchString(id) {
		return "", errBadRequest.quoting("%q is not a node's id: %s", clip(id, 70), nodeID)
	}
	return id, nil
}

// readNode reads the body of a PUT of a node.
func (c *call) readNode(id string) (r nodeRecord, err error) {
	ms, err := c.object()
	if err != nil {
		return r, err
	}
	r = nodeRecord{ID: id, Voter: true}
	for _, m := range ms {
		switch m.name {
		case "address":
			if m.raw[0] != '"' {
				return r, errBadRequest.because("address must be a string")
			}
			if r.Address, err = stringOf(m.raw); err != nil {
				return r, errBadRequest.because("address: %v", err)
			}
			if err := checkHost(r.Address); err != nil {
				return r, errInvalidValue.quoting("address: %v", err)
			}
		case "apiPort", "raftPort":
			if m.raw[0] != '-' && (m.raw[0] < '0' || m.raw[0] > '9') {
				return r, errBadRequest.because("%s must be a number", m.name)
			}
			port, err := strconv.Atoi(string(m.raw))
			if err != nil || port < 1 || port > 65535 {
				return r, errInvalidValue.because("%s must be a whole number, 1 to 65535", m.name)
			}
			if m.name == "apiPort" {
				r.APIPort = port
			} else {
				r.RaftPort = port
			}
		case "voter":
			if r.Voter = string(m.raw) == "true"; !r.Voter && string(m.raw) != "false" {
				return r, errBadRequest.because("voter must be true or false")
			}
		default:
			return r, unknownMember(m.name, "address, apiPort, raftPort, voter")
		}
	}
	switch {
	case r.Address == "":
		return r, errBadRequest.because("address is missing: the host by which nodes and clients reach the node")
	case r.APIPort == 0:
		return r, errBadRequest.because("apiPort is missing")
	case r.RaftPort == 0:
		return r, errBadRequest.because("raftPort is missing")
	case r.APIPort == r.RaftPort:
		return r, errInvalidValue.because("apiPort and raftPort are the same")
	}
	return r, nil
}

// probe makes sure that the node of a record answers at its address, and that it may be let in: by an
// empty directory, unless it is a member. The error is errConflict.
func (n *raftNode) probe(ctx context.Context, r nodeRecord, member bool) error {
	if me := n.cfg.self(); r.ID == n.id { // it cannot call itself, and knows where it is
		if !strings.EqualFold(r.Address, me.Address) || r.APIPort != me.ApiPort || r.RaftPort != me.RaftPort {
			return errConflict.because("by its file node %s is at %s, API port %d", n.id, hostPort(me.Address, me.RaftPort), me.ApiPort)
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*roundTime)
	defer cancel()
	by := newAsker(n.port, -1)
	by.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return n.port.try(ctx, r.ID, r.at()) }
	by.DisableKeepAlives = true
	const path = "/state"
	b, err := askAny(ctx, by, r.ID, fmt.Sprintf("%s?node=%s&identity=0&of=%s&api=%d", path, n.id, r.ID, r.APIPort))
	var nums []uint64
	if err == nil {
		nums, err = numbers(b, r.ID, path, 2)
	}
	if err != nil {
		if cause := errors.Unwrap(err); cause != nil {
			err = cause
		}
		return errConflict.because("node %s does not answer at %s as it should: start it there first, with -join, the cluster's secret and an empty directory (%v)", r.ID, r.at(), err)
	}
	if !member && nums[0] != stateEmpty {
		return errConflict.because("node %s holds data: stop it, move its directory away, start it with -join and try again", r.ID)
	}
	if nums[0] != stateEmpty {
		return n.sameTrail(ctx, by, r)
	}
	return nil
}

// sameTrail refuses a member at a new address whose trail is not this cluster's: clusters that share a
// secret, or have none, often have nodes of the same names, and one that follows two leaders confirms to
// both what it has of neither.
func (n *raftNode) sameTrail(ctx context.Context, by http.RoundTripper, r nodeRecord) error {
	var said nodeRow
	b, err := askAny(ctx, by, r.ID, "/node")
	if err == nil {
		err = json.Unmarshal(b, &said)
	}
	if err != nil {
		return errConflict.because("node %s does not say at %s what it holds (%v)", r.ID, r.at(), err)
	}
	if said.Revision == 0 {
		return nil
	}
	if !n.store.waitFor(ctx, said.Revision) {
		return errConflict.because("node %s at %s is of another cluster: it holds revision %d, and this one has none such", r.ID, r.at(), said.Revision)
	}
	h, ok, err := n.store.hashAt(said.Revision)
	if err == nil && ok && hex.EncodeToString(h[:]) != said.Hash { // of what was trimmed nothing is known
		err = errConflict.because("node %s at %s is of another cluster: its trail is not this one's", r.ID, r.at())
	}
	return err
}

// mayGrow refuses a second node to one that is a cluster by its own file: with its disk lost it would begin
// a new one, and its writes and those of the others would get under the same revisions.
func (n *raftNode) mayGrow() error {
	switch {
	case len(n.cfg.Cluster.Nodes) > 1:
		return nil
	case n.cfg.file == "":
		return errConflict.because("node %s runs without a configuration file, and so alone; start it with -config", n.id)
	}
	return errConflict.because("the configuration file of node %s lists nobody else, so with its directory lost it would begin a new cluster: "+
		"list the new node in its Cluster.Nodes, too, restart it and try again", n.id)
}

// mayLose refuses what would take a vote away, unless the voters that are left and answer are a majority
// of those that are left. What was ordered before counts as done.
func (s *server) mayLose(c *call, id string) error {
	n := s.node
	ro := n.roster.Load()
	var left []string
	for _, voter := range n.voters(id) {
		if rec, ok := ro.records[voter]; !ok || rec.Voter && !rec.Removed {
			left = append(left, voter)
		}
	}
	if len(left) == 0 {
		return errConflict.because("node %s is the last one that votes; add another first", id)
	}
	if c.q.Has("force") {
		return nil
	}
	ctx, cancel := context.WithTimeout(c.r.Context(), rowTime)
	defer cancel()
	answers := make(chan bool, len(left))
	for _, voter := range left {
		go func() {
			if voter == n.id {
				answers <- true
				return
			}
			_, err := n.ask(ctx, voter, "/applied", 1)
			answers <- err == nil
		}()
	}
	live := 0
	for range left {
		if <-answers {
			live++
		}
	}
	if need := len(left)/2 + 1; live < need {
		return errConflict.because("without node %s there are %d voters, of which %d answer, and %d are needed: start the others first; ?force does it all the same", id, len(left), live, need)
	}
	return nil
}

// stepAside hands leadership over, so that the next leader does what a leader cannot do to itself, and
// sends the request there as gate does.
func (s *server) stepAside(c *call) error {
	if err := s.node.handOver(); err != nil {
		return &problem{kind: errUnavailable, cause: err, detail: "this node leads, and no other could take over; try again"}
	}
	ctx, cancel := context.WithDeadline(c.r.Context(), c.deadline())
	defer cancel()
	// It is known before it has applied what it needs to lead, and would refuse until then.
	s.node.until(ctx, func() bool {
		id, _ := s.node.leader()
		if id == "" || id == s.node.id {
			return false
		}
		_, err := s.node.ask(ctx, id, questionPaths[acknowledged], 2)
		return err == nil
	})
	if done, err := s.gate(c); done || err != nil {
		return err
	}
	return errUnavailable.because("this node leads again; try again")
}

// until waits until f holds; false if ctx ends before.
func (n *raftNode) until(ctx context.Context, f func() bool) bool {
	for !f() {
		select {
		case <-time.After(10 * time.Millisecond): // the pace of the question: raft has no bell
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// settled reports whether raft's configuration is committed.
func (n *raftNode) settled() bool {
	r := n.raft.Load()
	return r.GetConfiguration().Index() <= r.CommitIndex()
}

// patience is until when a request waits for what it has ordered: it is done without, and whoever
// forwarded the request waits for an answer.
func (c *call) patience() time.Time {
	return c.start.Add(c.deadline().Sub(c.start) * 3 / 4)
}

// putNode adds a node to the cluster, or changes where it is and whether it votes.
func (s *server) putNode(c *call) error {
	id, err := c.nodeOf()
	if err != nil {
		return err
	}
	want, err := c.readNode(id)
	if err != nil {
		return err
	}
	n := s.node
	c.waited = true
	ctx, cancel := context.WithDeadline(c.r.Context(), c.patience())
	defer cancel()
	release, err := n.order(ctx)
	if err != nil {
		return err
	}
	defer func() { release() }()
	if err := n.reckon(); err != nil { // what was ordered before is applied, and decides
		return err
	}
	ro := n.roster.Load()
	was, known := ro.nodes[id]
	srv, member := n.server(id)
	votes := member && srv.Suffrage == raft.Voter
	if member && known && !ro.records[id].Removed {
		was.Voter = votes
		if was.same(want) && (ro.records[id].ID == "" || ro.records[id].Filed || ro.records[id].same(want)) {
			return s.answerNode(c, http.StatusOK, id) // nothing to change
		}
	}
	if err := conflict(ro.nodes, want); err != nil {
		return err
	}
	if votes && !want.Voter {
		if err := s.mayLose(c, id); err != nil {
			return err
		}
		if id == n.id {
			release()
			release = func() {}
			return s.stepAside(c)
		}
	}
	if !member {
		if err := n.mayGrow(); err != nil {
			return err
		}
	}
	if !member || was.at() != want.at() || was.APIPort != want.APIPort {
		if err := n.probe(ctx, want, member); err != nil {
			return err
		}
	}
	res, err := s.propose(c, &command{Op: "member", Node: &want, Known: n.known()})
	if err != nil {
		return err
	}
	if err := n.reckon(); err != nil {
		return err
	}
	n.reconcile()
	release()
	release = func() {}
	n.until(ctx, func() bool {
		srv, member := n.server(id)
		return member && (srv.Suffrage == raft.Voter) == want.Voter && n.settled() && (!want.Voter || n.rowOf(ctx, id).Role != "nonvoter")
	})
	return s.answerNode(c, res.putStatus(), id)
}

func (s *server) answerNode(c *call, status int, id string) error {
	b, err := json.Marshal(s.node.rowOf(c.r.Context(), id))
	if err != nil {
		return err
	}
	return c.sendJSON(status, b)
}

// deleteNode removes a node from the cluster.
func (s *server) deleteNode(c *call) error {
	id, err := c.nodeOf()
	if err != nil {
		return err
	}
	n := s.node
	c.waited = true
	ctx, cancel := context.WithDeadline(c.r.Context(), c.patience())
	defer cancel()
	release, err := n.order(ctx)
	if err != nil {
		return err
	}
	defer func() { release() }()
	if err := n.reckon(); err != nil { // what was ordered before is applied, and decides
		return err
	}
	srv, member := n.server(id)
	rec := n.roster.Load().nodes[id]
	rec.ID = id
	if recorded := n.roster.Load().records[id]; !member && (recorded.ID == "" || recorded.Removed) {
		return errNotFound.because("there is no node %s", id)
	}
	if member && srv.Suffrage == raft.Voter {
		if err := s.mayLose(c, id); err != nil {
			return err
		}
	}
	if id == n.id {
		release()
		release = func() {}
		return s.stepAside(c)
	}
	if _, err := s.propose(c, &command{Op: "unmember", Node: &rec, Known: n.known()}); err != nil {
		return err
	}
	if err := n.reckon(); err != nil {
		return err
	}
	n.reconcile()
	release()
	release = func() {}
	if !n.until(ctx, func() bool {
		_, member := n.server(id)
		return !member && n.settled()
	}) {
		return errUnknown.because("the removal of node %s is recorded, and is made as soon as a majority confirms it; GET /api/v1/cluster shows the node until then", id)
	}
	return c.sendNothing(http.StatusNoContent)
}

// moveLeader makes another node the leader.
func (s *server) moveLeader(c *call) error {
	ms, err := c.object()
	if err != nil {
		return err
	}
	id := ""
	for _, m := range ms {
		if m.name != "node" {
			return unknownMember(m.name, "node")
		}
		if m.raw[0] != '"' {
			return errBadRequest.because("node must be a string")
		}
		if id, err = stringOf(m.raw); err != nil {
			return errBadRequest.because("node: %v", err)
		}
	}
	if id == "" {
		return errBadRequest.because("node is missing: the id of the node that is to lead")
	}
	n := s.node
	c.waited = true
	ctx, cancel := context.WithDeadline(c.r.Context(), c.patience())
	defer cancel()
	release, err := n.order(ctx)
	if err != nil {
		return err
	}
	defer release()
	srv, member := n.server(id)
	rec := n.roster.Load().records[id]
	switch {
	case !member:
		return errNotFound.quoting("there is no node %q", clip(id, 70))
	case srv.Suffrage != raft.Voter || rec.ID != "" && (rec.Removed || !rec.Voter):
		return errConflict.because("node %s does not vote, so it cannot lead", id)
	case id != n.id:
		if !n.keepsUp(ctx, id) {
			return errUnavailable.because("node %s does not answer or has not caught up; try again", id)
		}
		if _, err := s.propose(c, &command{Op: "lead", Node: &nodeRecord{ID: id}, Known: []nodeRecord{{ID: n.id}}}); err != nil {
			return err
		}
		err := n.within(n.raft.Load().LeadershipTransferToServer(raft.ServerID(id), raft.ServerAddress(id)))
		if err == nil && !n.until(ctx, func() bool { now, _ := n.leader(); return now == id }) {
			err = errors.New("it does not lead yet")
		}
		if err != nil { // the trail has it, and raft may have asked the node to stand already
			return &problem{kind: errUnknown, cause: err, detail: "node " + id + " does not lead; it was told to, or may be yet: GET /api/v1/cluster says who leads"}
		}
	}
	b, err := json.Marshal(struct {
		LeaderID string `json:"leaderId"`
		Term     uint64 `json:"term"`
	}{id, n.term()})
	if err != nil {
		return err
	}
	return c.sendJSON(http.StatusOK, b)
}
