package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

// A nodeRecord is what the replicated state says of a node. It says what should be; the leader makes
// raft's configuration agree with it, see keepVoters, and the next one goes on where a leader
// stopped. The nodes with which the cluster was formed have no record before the first change of the
// membership, and are voters.
type nodeRecord struct {
	ID       string `json:"id"`
	Address  string `json:"address"`
	APIPort  int    `json:"apiPort"`
	RaftPort int    `json:"raftPort"`
	Voter    bool   `json:"voter"`
	Removed  bool   `json:"removed,omitempty"` // a tombstone: the node comes back by the API only
	// Filed says that nobody ordered this: it is what a leader's file said when the membership
	// first changed. A node whose own file lists that node goes by its file.
	Filed bool `json:"filed,omitempty"`
}

// same reports whether two records say the same of a node that is there.
func (r nodeRecord) same(o nodeRecord) bool {
	return r.at() == o.at() && r.APIPort == o.APIPort && r.Voter == o.Voter && !r.Removed && !o.Removed
}

// at is where the node's Raft port is reached.
func (r nodeRecord) at() string { return hostPort(r.Address, r.RaftPort) }

// text is the record as events show it.
func (r nodeRecord) text() *string {
	b := appendString([]byte(`{"id":`), r.ID)
	b = appendString(append(b, `,"address":`...), r.Address)
	b = strconv.AppendInt(append(b, `,"apiPort":`...), int64(r.APIPort), 10)
	b = strconv.AppendInt(append(b, `,"raftPort":`...), int64(r.RaftPort), 10)
	s := string(strconv.AppendBool(append(b, `,"voter":`...), r.Voter)) + "}"
	return &s
}

// readMembers reads all records, by node id.
func readMembers(tx *bbolt.Tx) (map[string]nodeRecord, error) {
	all := map[string]nodeRecord{}
	err := tx.Bucket(bucketMembers).ForEach(func(k, rec []byte) error {
		b, err := unseal(bucketMembers, k, rec)
		var r nodeRecord
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil {
			return fmt.Errorf("state.db: node %q: %w", k, err)
		}
		all[r.ID] = r
		return nil
	})
	return all, err
}

func (r nodeRecord) put(tx *bbolt.Tx) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	k := []byte(r.ID)
	return tx.Bucket(bucketMembers).Put(k, seal(k, append(make([]byte, 4), b...)))
}

// conflict says what of a node is another member's already; nil if nothing. Ids name directories,
// and file systems exist that ignore case.
func conflict(all map[string]nodeRecord, r nodeRecord) error {
	for _, id := range sortedKeys(all) {
		o := all[id]
		if o.Removed || o.ID == r.ID {
			continue
		}
		if strings.EqualFold(o.ID, r.ID) {
			return errConflict.because("there is a node %s; no two ids differ in case only", o.ID)
		}
		for _, port := range []int{r.APIPort, r.RaftPort} {
			if strings.EqualFold(o.Address, r.Address) && (port == o.APIPort || port == o.RaftPort) {
				return errConflict.because("%s is an address of node %s", hostPort(r.Address, port), o.ID)
			}
		}
	}
	return nil
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// member applies member and unmember.
func (b *batch) member(c *command) (*result, error) {
	all, err := readMembers(b.tx)
	if err != nil {
		return nil, err
	}
	var put []nodeRecord
	for _, k := range c.Known {
		if _, ok := all[k.ID]; !ok {
			all[k.ID] = k
			put = append(put, k)
		}
	}
	r := *c.Node
	old, there := all[r.ID]
	action, was := "node.add", (*string)(nil)
	if there && !old.Removed {
		was = old.text()
	}
	now := r.text()
	switch {
	case c.Op == "unmember" && !there:
		return &result{err: errNotFound.because("there is no node %s", r.ID)}, nil
	case c.Op == "unmember" && old.Removed, c.Op == "member" && there && !old.Filed && old.same(r):
		return &result{rev: b.pos.rev}, nil
	case c.Op == "unmember":
		r, action, now = old, "node.remove", nil
		r.Removed, r.Filed = true, false
	default:
		if err := conflict(all, r); err != nil {
			return &result{err: err}, nil
		}
	}
	at := b.next(c)
	if err := b.storeEvent(c, at, action, r.ID, was, now); err != nil {
		return nil, err
	}
	for _, r := range append(put, r) {
		if err := r.put(b.tx); err != nil {
			return nil, err
		}
	}
	b.joined = true
	return &result{rev: b.pos.rev, created: was == nil, changed: 1}, nil
}

// lead applies lead: that leadership is to move is noted, and then done.
func (b *batch) lead(c *command) (*result, error) {
	leader := func(id string) *string {
		s := string(append(appendString([]byte(`{"leader":`), id), '}'))
		return &s
	}
	var was *string
	if len(c.Known) > 0 {
		was = leader(c.Known[0].ID)
	}
	now := b.next(c)
	return &result{rev: b.pos.rev, changed: 1}, b.storeEvent(c, now, "leader.move", c.Node.ID, was, leader(c.Node.ID))
}

// A roster is whom a node knows. It does not change; raftNode.roster is replaced as a whole. Who is
// a member, and votes, raft's configuration says: see servers.
type roster struct {
	records map[string]nodeRecord // of the state, by node id
	nodes   map[string]nodeRecord // where each node is, removed ones too
	index   uint64                // of the state that it was made of, or of an earlier one
}

// A loggedRecord is a record of a raft entry that may not be applied yet. raft's configuration counts
// from when it is in the log, and then the node it speaks of must be found: by the record, which is
// in the log before it.
type loggedRecord struct {
	index uint64
	nodeRecord
}

// noteLogged is told of each command that comes into the log.
func (n *raftNode) noteLogged(e *raft.Log) {
	if !bytes.Contains(e.Data, []byte(`{"op":"member"`)) { // inside a string the quotes have backslashes
		return
	}
	cs, err := decodeCommands(e.Data)
	if err != nil {
		return // Apply says so
	}
	n.reckoning.Lock()
	for _, c := range cs {
		if c.Op == "member" && c.Node != nil {
			for _, r := range append(c.Known, *c.Node) {
				n.logged = append(n.logged, loggedRecord{e.Index, r})
			}
		}
	}
	n.reckoning.Unlock()
	n.mustReckon()
}

// findLogged looks for records in the log behind index.
func (n *raftNode) findLogged(index uint64) error {
	last, err := n.logs.LastIndex()
	if err != nil {
		return err
	}
	for e := new(raft.Log); index < last; {
		index++
		err := n.logs.GetLog(index, e)
		if errors.Is(err, raft.ErrLogNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if e.Type == raft.LogCommand {
			n.noteLogged(e)
		}
	}
	return nil
}

// reckon makes the roster anew. Of a node counts what somebody ordered, then this node's own file,
// then what a leader's file said; and the state more than what another node has told.
func (n *raftNode) reckon() error {
	n.reckoning.Lock()
	defer n.reckoning.Unlock()
	r := &roster{nodes: map[string]nodeRecord{}, index: n.store.at().index}
	err := n.store.view(func(tx *bbolt.Tx) (err error) {
		r.records, err = readMembers(tx)
		return err
	})
	if err != nil {
		return err
	}
	take := func(rec nodeRecord) {
		if _, filed := n.filed(rec.ID); !rec.Filed || !filed {
			r.nodes[rec.ID] = rec
		}
	}
	for _, m := range n.cfg.Cluster.Nodes {
		r.nodes[m.Id], _ = n.filed(m.Id)
	}
	for _, rec := range n.told {
		take(rec)
	}
	for _, rec := range r.records {
		take(rec)
	}
	n.logged = slices.DeleteFunc(n.logged, func(l loggedRecord) bool { return l.index <= r.index })
	for _, l := range n.logged {
		if rec, ok := r.records[l.ID]; !l.Filed || !ok || rec.Filed {
			take(l.nodeRecord)
		}
	}
	peers := map[string]peer{}
	for id, rec := range r.nodes {
		peers[id] = peer{raft: rec.at(), api: n.cfg.scheme() + hostPort(rec.Address, rec.APIPort)}
	}
	n.roster.Store(r)
	n.port.setPeers(peers)
	return nil
}

// mustReckon is reckon for a node that cannot go on without.
func (n *raftNode) mustReckon() {
	if err := n.reckon(); err != nil {
		n.halt(fmt.Errorf("%w; %s", err, rebuildState))
	}
}

// filed is what this node's file says of a node, as a record.
func (n *raftNode) filed(id string) (nodeRecord, bool) {
	for _, m := range n.cfg.Cluster.Nodes {
		if m.Id == id {
			return nodeRecord{ID: id, Address: m.Address, APIPort: m.ApiPort, RaftPort: m.RaftPort, Voter: true, Filed: true}, true
		}
	}
	return nodeRecord{}, false
}

// servers are the members of the cluster, as far as this node knows: raft's newest configuration, nil
// before raft has started.
func (n *raftNode) servers() []raft.Server {
	r := n.raft.Load()
	if r == nil {
		return nil
	}
	return r.GetConfiguration().Configuration().Servers
}

// server finds a member.
func (n *raftNode) server(id string) (s raft.Server, ok bool) {
	all := n.servers()
	i := slices.IndexFunc(all, func(s raft.Server) bool { return string(s.ID) == id })
	if i < 0 {
		return s, false
	}
	return all[i], true
}

// voters are the ids of the members that vote, but for one.
func (n *raftNode) voters(but string) (ids []string) {
	for _, s := range n.servers() {
		if s.Suffrage == raft.Voter && string(s.ID) != but {
			ids = append(ids, string(s.ID))
		}
	}
	return ids
}

// known are records of the members that have none: they have come by the file.
func (n *raftNode) known() (all []nodeRecord) {
	ro := n.roster.Load()
	for _, s := range n.servers() {
		id := string(s.ID)
		if r, ok := ro.nodes[id]; ok && ro.records[id].ID == "" {
			r.Voter, r.Filed = true, true
			all = append(all, r)
		}
	}
	return all
}

// A membership is the answer of one node to another that asks who belongs to the cluster.
type membership struct {
	Index   uint64       `json:"index"`   // of the state by which it is known
	Members []nodeRecord `json:"members"` // those that were removed too
}

func (n *raftNode) membership() membership {
	ro := n.roster.Load()
	m := membership{Index: ro.index}
	for _, id := range sortedKeys(ro.nodes) {
		if _, ok := n.server(id); ok || ro.nodes[id].Removed || ro.records[id].ID != "" {
			m.Members = append(m.Members, ro.nodes[id])
		}
	}
	return m
}

// learn takes over where another node says that the members are, for as long as this one's own
// state does not say. removed reports whether this node was removed.
func (n *raftNode) learn(ctx context.Context, from string) (removed bool, err error) {
	var m membership
	if err := n.askFor(ctx, from, "/members", &m); err != nil {
		return false, err
	}
	i := slices.IndexFunc(m.Members, func(r nodeRecord) bool { return r.ID == n.id })
	n.reckoning.Lock()
	n.told = slices.DeleteFunc(m.Members, func(r nodeRecord) bool { return r.ID == n.id })
	n.reckoning.Unlock()
	return i >= 0 && m.Members[i].Removed, n.reckon()
}

// keepRoster keeps the roster, and says where the file and the members differ, until the node stops.
func (n *raftNode) keepRoster() error {
	said, gone := "", false
	for {
		bell := n.store.joined.wait()
		n.mustReckon()
		if n.freshSince.Load() != nil && !n.removed() {
			if d := n.differences(); d != said {
				if said = d; d != "" {
					n.log.Warn("Cluster.Nodes of the configuration file is not what the cluster's members are; they count", "differences", d)
				}
			}
		}
		n.lookRemoved()
		if was := gone; !was {
			if gone = n.removed(); gone {
				n.log.Warn("this node was removed from the cluster; it is no member any more")
			}
		}
		select {
		case <-n.ctx.Done():
			return nil
		case <-bell:
		case <-time.After(time.Second): // raft's configuration has no bell
		}
	}
}

// differences says in which members, or where they are, this node's file and the cluster differ.
func (n *raftNode) differences() string {
	ro := n.roster.Load()
	var d []string
	for _, s := range n.servers() {
		id := string(s.ID)
		switch f, ok := n.filed(id); {
		case !ok:
			d = append(d, id+" is a member and not in the file")
		case ro.records[id].ID != "" && (ro.records[id].at() != f.at() || ro.records[id].APIPort != f.APIPort):
			r := ro.records[id]
			d = append(d, fmt.Sprintf("%s is at %s, API port %d", id, r.at(), r.APIPort))
		}
	}
	for _, m := range n.cfg.Cluster.Nodes {
		if _, ok := n.server(m.Id); !ok {
			d = append(d, m.Id+" is no member")
		}
	}
	return strings.Join(d, "; ")
}

// lookRemoved finds out whether this node was removed. A leader sends nothing to a node that it has
// removed, so one that has not heard from a leader asks the others.
func (n *raftNode) lookRemoved() {
	ms := stalenessMs(n.freshSince.Load())
	if n.removed() || n.leads() || 0 <= ms && ms < 2000 {
		return
	}
	ctx, cancel := context.WithTimeout(n.ctx, roundTime/2)
	defer cancel()
	ids := sortedKeys(n.roster.Load().nodes)
	answers := make(chan uint64, len(ids))
	for _, id := range ids {
		go func() {
			var m membership
			index := uint64(0)
			if id != n.id && n.askFor(ctx, id, "/members", &m) == nil &&
				slices.ContainsFunc(m.Members, func(r nodeRecord) bool { return r.ID == n.id && r.Removed }) {
				index = m.Index
			}
			answers <- index
		}()
	}
	for range ids {
		if index := <-answers; index > n.removedAt.Load() {
			n.removedAt.Store(index)
		}
	}
}

// removed reports whether this node knows that it is no member: by its own state, or because another
// node with a newer one has said so.
func (n *raftNode) removed() bool {
	ro := n.roster.Load()
	return ro.records[n.id].Removed || n.removedAt.Load() > n.store.at().index
}

// within waits for a future of raft's, which has no clock, as long as a request may take.
func (n *raftNode) within(f raft.Future) error {
	done := make(chan error, 1)
	go func() { done <- f.Error() }()
	select {
	case err := <-done:
		return err
	case <-time.After(n.cfg.requestTimeout()):
		return errors.New("not confirmed in time")
	}
}

// keepVoters makes raft's configuration what the records say, where this node leads: one change at a
// time, each when it is safe. A member without a record is to vote.
func (n *raftNode) keepVoters() error {
	for {
		select {
		case <-n.ctx.Done():
			return nil
		case <-n.due:
		case <-time.After(askPause):
		}
		if !n.leads() {
			continue
		}
		for _, s := range n.servers() {
			// The roster is taken behind the configuration: a node that is added again is in the
			// roster before it is in the configuration.
			rec, ok := n.roster.Load().records[string(s.ID)]
			switch {
			case ok && rec.Removed, ok && !rec.Voter && s.Suffrage == raft.Voter:
				n.takeVote(s.ID)
			case s.Suffrage != raft.Voter && (!ok || rec.Voter):
				n.giveVote(s.ID)
			}
		}
	}
}

// reconcile has keepVoters look at once.
func (n *raftNode) reconcile() {
	select {
	case n.due <- struct{}{}:
	default:
	}
}

// takeVote takes a member out, or its vote. A leader cannot do it to itself: it lets another lead.
func (n *raftNode) takeVote(id raft.ServerID) {
	if string(id) == n.id {
		n.handOver()
		return
	}
	n.rejoins.Lock()
	defer n.rejoins.Unlock()
	r := n.raft.Load()
	members := r.GetConfiguration()
	rec, ok := n.roster.Load().records[string(id)]
	var change raft.IndexFuture
	switch {
	case ok && rec.Removed:
		change = r.RemoveServer(id, members.Index(), n.cfg.requestTimeout())
	case ok && !rec.Voter:
		change = r.DemoteVoter(id, members.Index(), n.cfg.requestTimeout())
	default:
		return
	}
	if err := n.within(change); err != nil {
		n.log.Warn("vote not taken away", "member", string(id), "error", err)
	} else if rec.Removed {
		n.log.Info("a node is removed", "member", string(id))
	} else {
		n.log.Info("a node votes no longer", "member", string(id))
	}
}

// caughtUp is how many entries a node without a vote may be behind when it gets one.
const caughtUp = 256

// keepsUp reports whether a member answers and has as good as all that this leader has.
func (n *raftNode) keepsUp(ctx context.Context, id string) bool {
	ctx, cancel := context.WithTimeout(ctx, roundTime)
	defer cancel()
	nums, err := n.ask(ctx, id, "/applied", 1)
	return err == nil && nums[0]+caughtUp >= n.raft.Load().AppliedIndex()
}

// giveVote makes a member a voter if it has caught up. A node that is wiped meanwhile asks to
// rejoin, and that waits for n.rejoins: so it cannot have its vote by what it was before.
func (n *raftNode) giveVote(id raft.ServerID) {
	if !n.keepsUp(n.ctx, string(id)) { // one that is dead keeps nobody from rejoining
		return
	}
	n.rejoins.Lock()
	defer n.rejoins.Unlock()
	r := n.raft.Load()
	members := r.GetConfiguration()
	there := slices.ContainsFunc(members.Configuration().Servers, func(s raft.Server) bool { return s.ID == id })
	rec, ok := n.roster.Load().records[string(id)]
	if !there || ok && (rec.Removed || !rec.Voter) || !n.keepsUp(n.ctx, string(id)) {
		return
	}
	if err := n.within(r.AddVoter(id, raft.ServerAddress(id), members.Index(), n.cfg.requestTimeout())); err != nil {
		n.log.Warn("vote not given", "member", string(id), "error", err)
	} else {
		n.log.Info("a node has caught up and votes", "member", string(id))
	}
}
