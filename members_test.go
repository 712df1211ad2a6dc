package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
)

// newcomer makes a node that is to join the cluster, with -join and a file of its own that lists itself and
// one node of the cluster. It belongs to the cluster's nodes once somebody puts it there.
func (c *cluster) newcomer(id string, beside *node) *node {
	c.tb.Helper()
	api, raft := freePort(c.tb), freePort(c.tb)
	n := &node{
		tb: c.tb, id: id,
		api:  fmt.Sprintf("127.0.0.1:%d", api),
		raft: fmt.Sprintf("127.0.0.1:%d", raft),
		url:  fmt.Sprintf("http://127.0.0.1:%d", api),
		data: filepath.Join(filepath.Dir(beside.data), id),
		args: []string{"-config", filepath.Join(c.dir, id+".json"), "-node", id, "-join"},
		cwd:  c.dir, out: filepath.Join(c.dir, id+".out"), log: filepath.Join(c.dir, id+".log"),
	}
	n.config(beside, c)
	return n
}

// config writes the file of a node that joins c.
func (n *node) config(beside *node, c *cluster) {
	n.tb.Helper()
	row := func(n *node) map[string]any {
		_, api, _ := strings.Cut(n.api, ":")
		_, raft, _ := strings.Cut(n.raft, ":")
		return map[string]any{"Id": n.id, "Address": "127.0.0.1", "ApiPort": json.Number(api), "RaftPort": json.Number(raft)}
	}
	section := map[string]any{}
	for k, v := range c.doc["Cluster"].(map[string]any) {
		section[k] = v
	}
	section["Nodes"] = []any{row(beside), row(n)}
	doc := map[string]any{"Cluster": section, "Storage": c.doc["Storage"], "Auth": c.doc["Auth"]}
	text, err := json.Marshal(doc)
	if err != nil {
		n.tb.Fatal(err)
	}
	writeFile(n.tb, filepath.Join(c.dir, n.id+".json"), text)
}

// clusterDoc is the answer of GET /api/v1/cluster.
type clusterDoc struct {
	LeaderID       string
	Term, Revision uint64
	Nodes          []rowDoc
}

type rowDoc struct {
	ID, Address, Role, Hash, Version          string
	APIPort, RaftPort                         int
	Voter                                     bool
	Revision                                  uint64
	StalenessMs, LastContactMs, DiskFreeBytes int64
}

// members asks a node who belongs to the cluster.
func (n *node) members(tb testing.TB) (doc clusterDoc) {
	tb.Helper()
	a, err := do("GET", n.url+"/api/v1/cluster", readerKey, "")
	if err != nil || a.status != http.StatusOK {
		tb.Fatalf("GET /api/v1/cluster at %s: %v, %v", n.id, a, err)
	}
	if err := json.Unmarshal(a.body, &doc); err != nil {
		tb.Fatal(err)
	}
	return doc
}

// body is what is sent to add a node; more are members behind.
func (n *node) body(more string) string {
	_, api, _ := strings.Cut(n.api, ":")
	_, raft, _ := strings.Cut(n.raft, ":")
	return fmt.Sprintf(`{"address":"127.0.0.1","apiPort":%s,"raftPort":%s%s}`, api, raft, more)
}

// votes waits until a node says that these vote.
func (n *node) votes(tb testing.TB, want ...string) {
	tb.Helper()
	until(tb, 15*time.Second, func() error {
		var got []string
		for _, row := range n.members(tb).Nodes {
			if row.Voter {
				got = append(got, row.ID)
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			return fmt.Errorf("%s: voters (-want +got):\n%s", n.id, d)
		}
		return nil
	})
}

// add adds a node through n, whoever leads, and waits until it is a member.
func (n *node) add(tb testing.TB, which *node, more string) {
	tb.Helper()
	a := n.write(tb, "PUT", "/api/v1/cluster/nodes/"+which.id, which.body(more))
	if a.status != http.StatusCreated && a.status != http.StatusOK {
		tb.Fatalf("PUT of %s at %s: %v", which.id, n.id, a)
	}
}

// remove removes a node through n.
func (n *node) remove(tb testing.TB, id string) {
	tb.Helper()
	until(tb, 15*time.Second, func() error {
		a := n.write(tb, "DELETE", "/api/v1/cluster/nodes/"+id, "")
		if a.status == http.StatusGatewayTimeout {
			return fmt.Errorf("%v", a)
		}
		if a.status != http.StatusNoContent && a.status != http.StatusNotFound {
			tb.Fatalf("DELETE of %s at %s: %v", id, n.id, a)
		}
		return nil
	})
}

// TestMembers: a node joins a cluster without a vote, then with one, leads and is removed while it leads.
// Nothing that would cost the quorum is done, and the trail has all of it.
func TestMembers(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, steady)
	leader, beside := c.leader(), c.followers()[0]
	refused := func(method, path, body string, status int, part string) {
		t.Helper()
		if a := leader.ask(t, method, "/api/v1/cluster/"+path, body); a.status != status || !bytes.Contains(a.body, []byte(part)) ||
			!bytes.Contains(a.body, []byte(`"outcome":"not-applied"`)) {
			t.Errorf("%s %s %s: %v, want %d with %q", method, path, body, a, status, part)
		}
	}
	dead := &node{id: "node9", api: fmt.Sprintf("127.0.0.1:%d", freePort(t)), raft: fmt.Sprintf("127.0.0.1:%d", freePort(t))}
	refused("PUT", "nodes/node9", dead.body(""), 409, "does not answer")
	refused("PUT", "nodes/node9", beside.body(""), 409, beside.id)
	refused("PUT", "nodes/Node1", dead.body(""), 409, "case")
	refused("PUT", "nodes/node9", `{"apiPort":1,"raftPort":2}`, 400, "address is missing")
	refused("PUT", "nodes/node9", `{"address":"a b","apiPort":1,"raftPort":2}`, 422, "address")
	refused("PUT", "nodes/node9", `{"address":"a","apiPort":0,"raftPort":2}`, 422, "apiPort")
	refused("PUT", "nodes/-", "{}", 400, "id")
	refused("DELETE", "nodes/node9", "", 404, "node9")
	refused("POST", "leader", `{"node":"node9"}`, 404, "node9")
	if doc := leader.members(t); doc.LeaderID != leader.id || len(doc.Nodes) != 3 || doc.Revision != 0 {
		t.Fatalf("after what was refused: %+v", doc)
	}
	leader.put(t, "app", "k", "v")

	fourth := c.newcomer("node4", beside)
	c.nodes = append(c.nodes, fourth)
	fourth.start()
	until(t, 15*time.Second, func() error {
		code, st, err := fourth.status()
		if err != nil || code != 503 || !strings.Contains(st.Reason, "PUT /api/v1/cluster/nodes/node4 "+fourth.body("")) {
			return fmt.Errorf("%d %+v %v, want a reason that names the PUT", code, st, err)
		}
		return nil
	})
	refused("PUT", "nodes/node5", fourth.body(""), 409, "node4") // another's address
	beside.add(t, fourth, `,"voter":false`)
	until(t, 15*time.Second, func() error {
		if code, st, err := fourth.status(); err != nil || code != 200 || st.Role != "nonvoter" {
			return fmt.Errorf("%d %+v %v, want a node that is ready without a vote", code, st, err)
		}
		return nil
	})
	leader.votes(t, "node1", "node2", "node3")
	if e := fourth.get(t, "app", "k"); e.Value != "v" {
		t.Errorf("read on the replica: %+v", e)
	}
	fourth.put(t, "app", "k", "w") // which leads to the leader
	refused("POST", "leader", `{"node":"node4"}`, 409, "vote")

	beside.add(t, fourth, "")
	fourth.votes(t, "node1", "node2", "node3", "node4")
	fourth.kill()
	fourth.start() // -join means nothing now
	c.ready()
	before := leader.members(t).Revision
	beside.add(t, fourth, "") // nothing to change
	beside.add(t, leader, "")
	if after := leader.members(t).Revision; after != before {
		t.Errorf("a PUT that changes nothing made revision %d of %d", after, before)
	}
	for _, n := range c.nodes {
		doc := n.members(t)
		if len(doc.Nodes) != 4 || doc.LeaderID != leader.id {
			t.Fatalf("%s: %+v", n.id, doc)
		}
		for i, row := range doc.Nodes {
			at := c.nodes[i]
			if row.ID != at.id || hostPort(row.Address, row.APIPort) != at.api || hostPort(row.Address, row.RaftPort) != at.raft ||
				row.Version == "" || row.DiskFreeBytes <= 0 || len(row.Hash) != 64 || row.LastContactMs < 0 || row.LastContactMs > 5000 {
				t.Errorf("%s shows %+v for %s", n.id, row, at.id)
			}
		}
	}

	move := func() {
		t.Helper()
		if a := beside.write(t, "POST", "/api/v1/cluster/leader", `{"node":"node4"}`); a.status != 200 || !bytes.Contains(a.body, []byte(`{"leaderId":"node4","term":`)) {
			t.Fatalf("POST leader: %v", a)
		}
	}
	move()
	move() // it leads already
	if got := c.leader(); got != fourth {
		t.Fatalf("%s leads, not node4", got.id)
	}
	if a, err := do("PUT", beside.url+keyPath("app", "k"), adminKey, `{"value":"x"}`); err != nil || a.header.Get("Location") != fourth.url+keyPath("app", "k") {
		t.Errorf("a follower's redirect to a node that its file does not list: %v, %v", a, err)
	}

	beside.remove(t, "node4") // while it leads
	until(t, 15*time.Second, func() error {
		if code, st, err := fourth.status(); err != nil || code != 503 || !strings.Contains(st.Reason, "was removed") {
			return fmt.Errorf("%d %+v %v, want a node that says that it was removed", code, st, err)
		}
		return nil
	})
	beside.votes(t, "node1", "node2", "node3")
	refused("PUT", "nodes/node4", fourth.body(""), 409, "holds data")
	fourth.kill()

	leader = c.leader()
	others := c.followers()
	others[0].kill()
	refused("DELETE", "nodes/"+others[1].id, "", 409, "?force")
	refused("PUT", "nodes/"+others[1].id, others[1].body(`,"voter":false`), 409, "?force")
	refused("DELETE", "nodes/"+leader.id, "", 409, "?force")
	for _, row := range leader.members(t).Nodes {
		want := rowDoc{ID: row.ID, Address: row.Address, APIPort: row.APIPort, RaftPort: row.RaftPort, Role: "unreachable", Voter: true,
			StalenessMs: -1, LastContactMs: -1, DiskFreeBytes: -1}
		if (row == want) != (row.ID == others[0].id) {
			t.Errorf("with %s dead: %+v", others[0].id, row)
		}
	}
	others[0].start()
	c.ready()

	var said []string
	for _, e := range leader.trail(t, "") {
		if e.Namespace == "" {
			if e.Actor != "ops@test" || e.Source != "127.0.0.1" {
				t.Errorf("event %s", e.raw)
			}
			said = append(said, e.Action+" "+e.Key)
		}
	}
	if d := cmp.Diff([]string{"node.add node4", "node.add node4", "leader.move node4", "node.remove node4"}, said); d != "" {
		t.Errorf("the trail (-want +got):\n%s", d)
	}
	if text := beside.logged(); strings.Count(text, "Cluster.Nodes of the configuration file is not") != 1 {
		t.Errorf("%s does not warn once that node4 is not in its file", beside.id)
	}
}

// TestMembersMistaken: what an operator with bad luck asks for. A leader whose own address is mistyped, a
// member that is sent to a node of another cluster of the same name and secret, a second node for one that is
// a cluster by its own file, and leadership for a node that cannot take it.
func TestMembersMistaken(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, steady, with("Cluster", "Forward", true))
	full := filepath.Join(c.dir, "full.json") // node3 finds its disk too full for any entry
	c.configure(with("Storage", "MinFreeMiB", 1<<30))
	text, err := os.ReadFile(c.config)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, full, text)
	c.configure(with("Storage", "MinFreeMiB", 1))
	c.expects = append(c.expects, "disk is nearly full", "failed to", "transfer leadership", "free, less than Storage.MinFreeMiB")
	c.start()
	other := startCluster(t, 1, with("Cluster", "Secret", clusterSecret))
	lone := other.nodes[0]
	lone.put(t, "app", "k", "another")
	at := c.leader()
	at.put(t, "app", "k", "v")
	refused := func(n *node, id, body, part string) {
		t.Helper()
		a := n.ask(t, "PUT", "/api/v1/cluster/nodes/"+id, body)
		if a.status != 409 || !bytes.Contains(a.body, []byte(part)) || !bytes.Contains(a.body, []byte(`"outcome":"not-applied"`)) {
			t.Errorf("PUT of %s %s at %s: %v, want 409 with %q", id, body, n.id, a, part)
		}
	}
	moved := func(n *node) string {
		_, api, _ := strings.Cut(n.api, ":")
		return fmt.Sprintf(`{"address":"127.0.0.1","apiPort":%s,"raftPort":%d}`, api, freePort(t))
	}
	refused(at, at.id, moved(at), "by its file")
	refused(lone, "node2", c.nodes[1].body(""), "lists nobody else")

	first, second := c.nodes[0], c.nodes[1]
	lead := func(n *node) *answer {
		return second.write(t, "POST", "/api/v1/cluster/leader", fmt.Sprintf(`{"node":"%s"}`, n.id))
	}
	if a := lead(second); a.status != 200 {
		t.Fatalf("POST leader: %v", a)
	}
	c.leader()
	refused(second, "node1", lone.body(""), "another cluster")
	c.nodes[2].kill()
	c.nodes[2].args = []string{"-config", full, "-node", "node3"}
	c.nodes[2].start()
	c.ready()
	// The trail has it that node3 is to lead, so it is not said that nothing was done.
	if a := lead(c.nodes[2]); a.status != 504 || !bytes.Contains(a.body, []byte(`"outcome":"unknown"`)) {
		t.Errorf("POST leader for a node with a full disk: %v, want 504", a)
	}
	c.nodes[2].kill()
	c.nodes[2].args = []string{"-config", c.config, "-node", "node3"}
	c.nodes[2].start()
	c.ready()
	// A leader loses its own vote by its word to the next one, which it forwards.
	if got := c.leader(); got != second {
		t.Fatalf("%s leads, not node2", got.id)
	}
	if a, err := do("PUT", second.url+"/api/v1/cluster/nodes/node2", adminKey, second.body(`,"voter":false`)); err != nil || a.status != 200 {
		t.Errorf("a leader that is to lose its vote: %v, %v", a, err)
	}
	first.votes(t, "node1", "node3")
}

// TestMemberCommands: what the commands of the membership do to the state.
func TestMemberCommands(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	rec := func(id string, port int, voter bool) nodeRecord {
		return nodeRecord{ID: id, Address: "10.0.0.1", APIPort: port, RaftPort: port + 1, Voter: voter}
	}
	filed := func(r nodeRecord) nodeRecord { r.Filed = true; return r }
	known := []nodeRecord{filed(rec("node1", 10, true)), filed(rec("node2", 20, true))}
	put := func(op string, r nodeRecord) *result {
		return w.apply(&command{Op: op, Node: &r, Known: known, Actor: "ops@test"})[0]
	}
	four := rec("node4", 40, true)
	for _, step := range []struct {
		what    string
		res     *result
		rev     uint64
		created bool
		err     error
	}{
		{"add", put("member", four), 1, true, nil},
		{"the same again", put("member", four), 1, false, nil},
		{"a vote taken", put("member", rec("node4", 40, false)), 2, false, nil},
		{"an address of another", put("member", rec("node5", 39, true)), 0, false, errConflict},
		{"an address of the file's", put("member", rec("node5", 20, true)), 0, false, errConflict},
		{"case", put("member", rec("NODE4", 60, true)), 0, false, errConflict},
		{"remove", put("unmember", nodeRecord{ID: "node4"}), 3, false, nil},
		{"remove again", put("unmember", nodeRecord{ID: "node4"}), 3, false, nil},
		{"remove what is not there", put("unmember", nodeRecord{ID: "node7"}), 0, false, errNotFound},
		{"its address is free", put("member", rec("node5", 40, true)), 4, true, nil},
		{"remove one of the file's", put("unmember", nodeRecord{ID: "node2"}), 5, false, nil},
		{"lead", w.apply(&command{Op: "lead", Node: &nodeRecord{ID: "node5"}, Known: known[:1], Actor: "ops@test"})[0], 6, false, nil},
	} {
		if !errors.Is(step.res.err, step.err) || step.res.rev != step.rev || step.res.created != step.created {
			t.Errorf("%s: %+v, want revision %d, created %t, %v", step.what, step.res, step.rev, step.created, step.err)
		}
	}
	gone := rec("node4", 40, false)
	gone.Removed = true
	two := rec("node2", 20, true)
	two.Removed = true
	want := map[string]nodeRecord{"node1": known[0], "node2": two, "node4": gone, "node5": rec("node5", 40, true)}
	var events []string
	err := w.st.view(func(tx *bbolt.Tx) error {
		got, err := readMembers(tx)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("records (-want +got):\n%s", d)
		}
		err = errors.Join(err, checkRecords(tx))
		for rev := uint64(1); rev <= 6 && err == nil; rev++ {
			var rec eventRecord
			if rec, _, err = getEvent(tx, place{rev, 0}); err != nil {
				break
			}
			var ev *event
			if ev, err = rec.decode(); err != nil {
				break
			}
			events = append(events, strings.Join([]string{ev.Action, ev.Key, str(ev.OldValue), str(ev.NewValue)}, " "))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	text := func(id string, port int, voter bool) string {
		return fmt.Sprintf(`{"id":"%s","address":"10.0.0.1","apiPort":%d,"raftPort":%d,"voter":%t}`, id, port, port+1, voter)
	}
	if d := cmp.Diff([]string{
		"node.add node4 - " + text("node4", 40, true),
		"node.add node4 " + text("node4", 40, true) + " " + text("node4", 40, false),
		"node.remove node4 " + text("node4", 40, false) + " -",
		"node.add node5 - " + text("node5", 40, true),
		"node.remove node2 " + text("node2", 20, true) + " -",
		`leader.move node5 {"leader":"node1"} {"leader":"node5"}`,
	}, events); d != "" {
		t.Errorf("events (-want +got):\n%s", d)
	}
}

func str(s *string) string {
	if s == nil {
		return "-"
	}
	return *s
}

// TestOlderStateFile: a file without bucket members gets it, when it is opened and when it comes as a snapshot.
func TestOlderStateFile(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"))
	if err := w.st.db.Update(func(tx *bbolt.Tx) error { return tx.DeleteBucket(bucketMembers) }); err != nil {
		t.Fatal(err)
	}
	var older bytes.Buffer
	if err := w.st.db.View(func(tx *bbolt.Tx) error { _, err := tx.WriteTo(&older); return err }); err != nil {
		t.Fatal(err)
	}
	if err := w.st.Close(); err != nil {
		t.Fatal(err)
	}
	to := newWriter(t, t.TempDir())
	if err := to.st.replace(&older); err != nil {
		t.Fatal(err)
	}
	to.index = to.st.at().index
	for _, w := range []*writer{newWriter(t, w.st.dir), to} {
		r := nodeRecord{ID: "node4", Address: "a", APIPort: 1, RaftPort: 2}
		if res := w.apply(&command{Op: "member", Node: &r})[0]; res.err != nil || res.rev != 2 {
			t.Errorf("%+v", res)
		}
	}
}

// TestMovedByFile: a node that was added because the leader's file lists it, as after -restore, is found by the
// files when they say that it is somewhere else: no PUT has said where it is.
func TestMovedByFile(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, calm)
	all := c.doc["Cluster"].(map[string]any)["Nodes"].([]any)
	c.configure(with("Cluster", "Nodes", all[:1]))
	first, second := c.nodes[0], c.nodes[1]
	first.start()
	until(t, 15*time.Second, first.ready)
	first.stop()
	c.configure(with("Cluster", "Nodes", all))
	c.start()
	first.votes(t, "node1", "node2")
	for _, n := range c.nodes {
		n.stop()
	}
	for i, n := range c.nodes {
		api, raft := freePort(t), freePort(t)
		all[i].(map[string]any)["ApiPort"], all[i].(map[string]any)["RaftPort"] = api, raft
		n.api, n.raft = fmt.Sprintf("127.0.0.1:%d", api), fmt.Sprintf("127.0.0.1:%d", raft)
		n.url = "http://" + n.api
	}
	c.configure()
	c.start()
	for _, row := range first.members(t).Nodes {
		if row.ID == second.id && hostPort(row.Address, row.RaftPort) != second.raft {
			t.Errorf("%s is shown at %+v, and is at %s", second.id, row, second.raft)
		}
	}
}

// TestOldFiles: two nodes of three, whose files do not list the two that came later, lose their disks and the
// third is away. They are a majority of their files, and begin no new cluster beside the one that calls them.
func TestOldFiles(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, calm)
	first := c.nodes[0]
	for _, id := range []string{"node4", "node5"} {
		n := c.newcomer(id, c.nodes[2])
		c.nodes = append(c.nodes, n)
		n.start()
		until(t, 15*time.Second, func() error { _, _, err := n.status(); return err })
		first.add(t, n, "")
	}
	first.votes(t, "node1", "node2", "node3", "node4", "node5")
	first.put(t, "app", "k", "v")
	c.ready()
	for _, n := range c.nodes[:3] {
		n.kill()
	}
	for _, n := range c.nodes[:2] {
		if err := os.RemoveAll(n.data); err != nil {
			t.Fatal(err)
		}
		n.start()
	}
	until(t, 15*time.Second, func() error {
		if code, st, err := first.status(); err != nil || code != 503 || !strings.Contains(st.Reason, "takes this one for a member") {
			return fmt.Errorf("%d %+v %v", code, st, err)
		}
		return nil
	})
	time.Sleep(formMoment + time.Second) // what must not happen has no bell
	if text := first.logged(); strings.Count(text, "forming a new cluster") != 1 {
		t.Fatal("node1 begins a cluster of its own")
	}
	c.nodes[2].start()
	c.ready()
	first.votes(t, "node1", "node2", "node3", "node4", "node5")
	if e := first.get(t, "app", "k"); e.Value != "v" {
		t.Errorf("%+v", e)
	}
}

// TestMembersOfFile: nodes of the file that are no members, and come with empty directories to a cluster
// that is one node, are added. One that joins waits for a PUT all the same, and one of a file that lists nobody
// who leads finds the leader.
func TestMembersOfFile(t *testing.T) {
	long(t)
	c := newCluster(t, 3)
	section := c.doc["Cluster"].(map[string]any)
	all := section["Nodes"].([]any)
	c.configure(with("Cluster", "Nodes", all[:1]))
	first := c.nodes[0]
	first.start()
	until(t, 15*time.Second, first.ready)
	first.put(t, "app", "k", "v")
	first.stop()
	c.configure(with("Cluster", "Nodes", all))
	c.nodes[2].args = append(c.nodes[2].args, "-join")
	for _, n := range c.nodes {
		n.start()
		until(t, 15*time.Second, func() error { _, _, err := n.status(); return err })
	}
	first.votes(t, "node1", "node2")
	c.nodes[1].add(t, c.nodes[2], "")
	first.votes(t, "node1", "node2", "node3")
	c.ready()
	var said []string
	for _, e := range first.trail(t, "") {
		if e.Namespace == "" {
			said = append(said, e.Action+" "+e.Key+" "+e.Actor)
		}
	}
	if d := cmp.Diff([]string{"node.add node2 confman", "node.add node3 ops@test"}, said); d != "" {
		t.Errorf("the trail (-want +got):\n%s", d)
	}
	// Wiped, the first finds the others again.
	c.ready()
	if a := first.write(t, "POST", "/api/v1/cluster/leader", `{"node":"node3"}`); a.status != 200 {
		t.Fatalf("POST leader: %v", a)
	}
	fourth := c.newcomer("node4", c.nodes[1]) // its file does not list node3, which leads
	c.nodes = append(c.nodes, fourth)
	fourth.start()
	until(t, 15*time.Second, func() error { _, _, err := fourth.status(); return err })
	first.add(t, fourth, "")
	first.votes(t, "node1", "node2", "node3", "node4")
	fourth.kill()
	if err := os.RemoveAll(fourth.data); err != nil {
		t.Fatal(err)
	}
	fourth.start()
	c.ready()
	first.votes(t, "node1", "node2", "node3", "node4")
	if text := fourth.logged(); strings.Count(text, `msg="rejoining without a vote"`) != 2 {
		t.Error("node4 does not say that it came back empty")
	}
}

// TestMembersUnderLoad: three nodes become five and three again, one is replaced by a new one under its
// id, and a dead address is tried, while clients write. Each round begins with the nodes of the one before.
func TestMembersUnderLoad(t *testing.T) {
	long(t)
	c := startCluster(t, 3)
	load := startLoad(c, 4)
	next := 3
	enter := func(n *node) {
		load.mu.Lock()
		c.nodes = append(c.nodes, n)
		load.mu.Unlock()
		n.start()
		until(t, 15*time.Second, func() error { _, _, err := n.status(); return err })
	}
	leave := func(n *node) {
		n.kill()
		load.mu.Lock()
		defer load.mu.Unlock()
		c.nodes = slices.DeleteFunc(slices.Clone(c.nodes), func(o *node) bool { return o == n })
	}
	voters := func() (ids []string) {
		for _, n := range c.live() {
			ids = append(ids, n.id)
		}
		slices.Sort(ids)
		return ids
	}
	for round := range rounds(1, 5) {
		dead := &node{id: "dead", api: fmt.Sprintf("127.0.0.1:%d", freePort(t)), raft: fmt.Sprintf("127.0.0.1:%d", freePort(t))}
		if a := c.live()[0].write(t, "PUT", "/api/v1/cluster/nodes/dead", dead.body("")); a.status != 409 {
			t.Fatalf("a dead address: %v", a)
		}
		for range 2 {
			next++
			n := c.newcomer(fmt.Sprintf("node%d", next), c.live()[0])
			enter(n)
			c.live()[0].add(t, n, "")
			c.live()[0].votes(t, voters()...)
			load.more(limit(30*time.Second), 50)
		}
		// One dies with its disk and comes back under its id, at other ports.
		lost := c.live()[2]
		lost.kill()
		load.more(limit(30*time.Second), 50)
		at := c.live()[0]
		at.remove(t, lost.id)
		leave(lost)
		if err := os.RemoveAll(lost.data); err != nil {
			t.Fatal(err)
		}
		n := c.newcomer(lost.id, at)
		enter(n)
		at.add(t, n, "")
		at.votes(t, voters()...)
		load.more(limit(30*time.Second), 50)
		// Two go, the leader among them.
		for _, gone := range []*node{c.leader(), c.followers()[0]} {
			from := c.live()[slices.IndexFunc(c.live(), func(n *node) bool { return n != gone })]
			from.remove(t, gone.id)
			leave(gone)
			c.live()[0].votes(t, voters()...)
			load.more(limit(30*time.Second), 50)
		}
		// The power of all fails. What is left is raft's log, by which those that joined find each other.
		for _, n := range c.live() {
			n.kill()
			if err := os.Remove(filepath.Join(n.data, "state.mark")); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range c.nodes {
			n.start()
		}
		c.ready()
		load.more(limit(30*time.Second), 50)
		t.Logf("round %d: %v", round, voters())
	}
	load.end()
	load.check()
	if a := c.live()[0].ask(t, "GET", "/api/v1/verify?consistent", ""); a.status != 200 || !bytes.Contains(a.body, []byte(`"ok":true`)) {
		t.Errorf("verify: %v", a)
	}
}
