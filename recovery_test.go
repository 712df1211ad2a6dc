package main

// What a process or a machine leaves behind that ends in the middle of something, what is left where
// a file is gone, and work that takes long: a node goes on, or ends and says what to do, and
// whatever it does loses nothing that was acknowledged.

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

// TestShortTransactions: what raft hands over at once is applied in transactions that the watchdog does
// not take for a disk that hangs, however much it is.
func TestShortTransactions(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	m := newMachine(t, w.st)
	transactions := func() (id int) {
		if err := w.st.db.Update(func(tx *bbolt.Tx) error { id = tx.ID(); return nil }); err != nil {
			t.Fatal(err)
		}
		return id
	}
	for _, c := range []struct{ entries, bytes, want int }{{32, 100, 1}, {8, applyBytes, 8}, {8, applyBytes / 2, 4}, {1, 3 * applyBytes, 1}} {
		var logs []*raft.Log
		for i := range c.entries {
			data, err := encode(set("app", fmt.Sprintf("k%d", i), strings.Repeat("x", c.bytes)))
			if err != nil {
				t.Fatal(err)
			}
			w.index++
			logs = append(logs, &raft.Log{Index: w.index, Term: 1, Type: raft.LogCommand, Data: data})
		}
		before := transactions()
		out := m.ApplyBatch(logs)
		if got := transactions() - before - 1; got != c.want || len(out) != c.entries {
			t.Errorf("%d entries of %d bytes: %d answers in %d transactions, want %d", c.entries, c.bytes, len(out), got, c.want)
		}
		if at := w.st.at().index; at != w.index {
			t.Errorf("%d entries of %d bytes: the state is at %d, want %d", c.entries, c.bytes, at, w.index)
		}
	}
}

// bigPatch is a body that changes 10,000 keys.
func bigPatch(round int) string {
	var b strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&b, `,"k%05d":"%d"`, i, round)
	}
	return "{" + b.String()[1:] + "}"
}

// TestLargePatches: a log of large patches is replayed after a power cut in a time that its size
// allows, and beside them reads go on.
func TestLargePatches(t *testing.T) {
	long(t)
	c := startCluster(t, 3, with("Cluster", "RequestTimeout", 30_000), with("Cluster", "Forward", true), calm)
	c.nodes[0].put(t, "app", "k", "v")
	patient := &http.Client{Transport: transport} // which the tests' own clients are not
	var writers, readers sync.WaitGroup
	quit := make(chan struct{})
	for w := range 8 {
		writers.Go(func() {
			for r := 0; r < 10; r++ {
				a, err := doWith(patient, "PATCH", c.nodes[r%3].url+"/api/v1/config/big", adminKey, bigPatch(w*100+r))
				if err == nil && (a.status == http.StatusServiceUnavailable || a.status == http.StatusTemporaryRedirect) {
					r-- // another node leads
				} else if err != nil || a.status != http.StatusOK && a.status != http.StatusGatewayTimeout {
					t.Errorf("patch: %v, %v", a, err)
				}
			}
		})
	}
	var mu sync.Mutex // protects reads
	reads := map[string]int{}
	for _, n := range c.nodes {
		for _, form := range []string{"", "?consistent"} {
			readers.Go(func() {
				for {
					select {
					case <-quit:
						return
					case <-time.After(100 * time.Millisecond): // the pace of the question
					}
					a, err := do("GET", n.url+keyPath("app", "k")+form, readerKey, "")
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					reads[fmt.Sprint(form, " ", a.status)]++
					mu.Unlock()
				}
			})
		}
	}
	writers.Wait()
	close(quit)
	readers.Wait()
	t.Log("reads meanwhile: ", reads)
	for _, form := range []string{"", "?consistent"} {
		if ok, no := reads[form+" 200"], reads[form+" 503"]; ok == 0 || no > ok/4 {
			t.Errorf("reads %q beside large patches: %d are answered, %d refused", form, ok, no)
		}
	}
	c.converge()
	for _, n := range c.nodes {
		n.kill()
	}
	start := time.Now()
	for _, n := range c.nodes {
		otherBoot(t, n)
		n.start()
	}
	for _, n := range c.nodes {
		until(t, limit(60*time.Second)-time.Since(start), n.ready)
	}
	t.Logf("ready %v after a power cut", time.Since(start).Round(time.Millisecond))
	verify(c)
}

// A countingLog counts the entries that are looked at.
type countingLog struct {
	raft.LogStore
	gets atomic.Int64
}

func (l *countingLog) GetLog(index uint64, e *raft.Log) error {
	l.gets.Add(1)
	return l.LogStore.GetLog(index, e)
}

// TestHolds: barriers, which a client that settles outcomes makes as many of as it likes, never come to
// the state. A leader neither waits for them nor looks at them twice, also where its log was cut behind
// them.
func TestHolds(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	n := aloneInMemory(t, w.st)
	r := n.raft.Load()
	barrier := func() uint64 {
		if err := r.Barrier(0).Error(); err != nil {
			t.Fatal(err)
		}
		return r.CommitIndex()
	}
	data, err := encode(set("app", "k", "v"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Apply(data, 0).Error(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		at := barrier()
		if err := n.holds(t.Context(), at); err != nil || n.quiet.Load() != at {
			t.Errorf("holds(%d): %v, and it was to wait for nothing up to %d", at, err, n.quiet.Load())
		}
	}
	looked := &countingLog{LogStore: n.recent}
	n.recent = looked
	at := barrier()
	if err := n.holds(t.Context(), at); err != nil || looked.gets.Load() != 1 {
		t.Errorf("behind one barrier more it looks at %d entries: %v", looked.gets.Load(), err)
	}
	n.quiet.Store(0)
	for range 5 {
		at = barrier()
	}
	if err := n.recent.DeleteRange(1, at-1); err != nil {
		t.Fatal(err)
	}
	if err := n.holds(t.Context(), at); err != nil {
		t.Errorf("holds(%d) where the log begins there: %v", at, err)
	}
}

// TestUnfinishedSnapshots: what a process that was killed while it wrote a snapshot leaves is removed,
// and does not count as one of those that are kept.
func TestUnfinishedSnapshots(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, trans := raft.NewInmemTransport("a")
	open := func() *snapshotStore {
		s, err := openSnapshots(dir, hclog.NewNullLogger(), func(err error) { t.Error(err) })
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	take := func(s *snapshotStore, index uint64, finish func(raft.SnapshotSink) error) {
		sink, err := s.Create(1, index, 2, raft.Configuration{}, 1, trans)
		if err == nil {
			_, err = sink.Write([]byte("state"))
		}
		if err == nil {
			err = finish(sink)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	whole := raft.SnapshotSink.Close
	s := open()
	take(s, 100, whole)
	take(s, 200, whole)
	for _, index := range []uint64{300, 400, 500} { // killed before meta.sum was there
		take(open(), index, func(sink raft.SnapshotSink) error { return sink.(*snapshotSink).SnapshotSink.Close() })
	}
	take(open(), 600, func(raft.SnapshotSink) error { return nil }) // and before it had its name
	take(s, 700, raft.SnapshotSink.Cancel)
	s = open()
	metas, err := s.List()
	if err != nil || len(metas) == 0 || metas[0].Index != 200 {
		t.Errorf("the newest of %v (%v) is not that at 200, behind which the log begins", metas, err)
	}
	if left, err := os.ReadDir(s.dir); err != nil || len(left) != len(metas) {
		t.Errorf("%v is left, %v", left, err)
	}
	take(s, 800, whole)
	if metas, err = s.List(); err != nil || len(metas) != 2 || metas[0].Index != 800 {
		t.Errorf("%v, %v", metas, err)
	}
}

// TestLogLost: a node whose log is gone has forgotten what it acknowledged and how it voted. It does
// not take part, though its snapshots are there and its state file has to be thrown away.
func TestLogLost(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	a := c.leader()
	b, laggard := c.followers()[0], c.followers()[1]
	value := strings.Repeat("x", 900<<10)
	for i := range 6 {
		a.put(t, "app", fmt.Sprint("k", i), value)
	}
	until(t, 15*time.Second, func() error {
		if len(snapshots(t, b)) == 0 {
			return errors.New("no snapshot is taken")
		}
		return nil
	})
	laggard.pause()
	last := a.put(t, "app", "k", "acknowledged by two")
	b.knows(t, last)
	b.kill()
	if err := os.Remove(filepath.Join(b.data, "raft.db")); err != nil {
		t.Fatal(err)
	}
	otherBoot(t, b)
	a.kill()
	laggard.resume()
	b.start()
	names(t, b.fails(t, 10*time.Second), "raft.db", "log was lost", "move this node's data directory away")
	if err := os.RemoveAll(b.data); err != nil {
		t.Fatal(err)
	}
	b.start()
	a.start()
	c.ready()
	for _, n := range c.nodes {
		n.knows(t, last)
	}
	verify(c)
}

// TestFormationCut: nodes that were killed before raft had its members are as empty as before, and those
// that were not take them for what they are.
func TestFormationCut(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	for _, n := range c.nodes {
		n.stop()
	}
	for _, n := range c.nodes[1:] { // what such a kill leaves
		identity := filepath.Join(n.data, "identity")
		b, err := os.ReadFile(identity)
		if err == nil {
			err = os.WriteFile(identity, []byte(strings.Replace(string(b), identityUsed, identityFresh, 1)), 0o600)
		}
		if err = errors.Join(err, os.Remove(filepath.Join(n.data, "raft.db")), os.Remove(filepath.Join(n.data, "state.db"))); err != nil {
			t.Fatal(err)
		}
	}
	c.start()
	c.leader().put(t, "app", "k", "v")
	verify(c)
}

// TestUsedAtLast: the directory is used when raft has its members, and before raft votes.
func TestUsedAtLast(t *testing.T) {
	t.Parallel()
	n := &raftNode{dir: t.TempDir()}
	read := func() string {
		b, err := os.ReadFile(filepath.Join(n.dir, "identity"))
		if err != nil {
			t.Fatal(err)
		}
		_, word, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
		return word
	}
	if err := n.readIdentity(false); err != nil {
		t.Fatal(err)
	}
	if err := n.becomeUsed(map[string]uint64{"node2": 2}); err != nil || read() != identityFresh || n.formed.Load() == nil {
		t.Errorf("before raft has its members the directory is %s (%v)", read(), err)
	}
	if err := n.markUsed(); err != nil || read() != identityUsed {
		t.Errorf("then it is %s (%v)", read(), err)
	}
}

// TestPageGone: a page of the state file that the disk does not give ends the node with a message.
func TestPageGone(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	n := c.nodes[0]
	for i := range 50 {
		n.put(t, "app", fmt.Sprint("k", i), strings.Repeat("y", 20_000))
	}
	c.expects = append(c.expects, "fault address", "state.db")
	if err := os.Truncate(filepath.Join(n.data, "state.db"), 16384); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 50 && n.running(); i++ {
		if a, err := do("GET", n.url+keyPath("app", fmt.Sprint("k", i)), readerKey, ""); err != nil || a.status != http.StatusOK {
			break
		}
	}
	names(t, n.fails(t, 5*time.Second), "state.db", "remove state.db and start again")
	if err := os.Remove(filepath.Join(n.data, "state.db")); err != nil {
		t.Fatal(err)
	}
	n.start()
	c.ready()
	if got := n.get(t, "app", "k7").Value; len(got) != 20_000 {
		t.Errorf("k7 has %d bytes", len(got))
	}
}

// TestRestoreWithoutRoom: where the state has to be made anew from the snapshot and the disk is full, the
// node says so. It does not say that a file is damaged, for that would cost the data.
func TestRestoreWithoutRoom(t *testing.T) {
	t.Parallel()
	v := newVolume(t, 512) // whose state file, log and snapshots, however far they are apart, leave twice the state free
	c := newCluster(t, 1, with("Storage", "MinFreeMiB", 8))
	c.expects = append(c.expects, "disk is nearly full") // unless it has ended before it looks
	n := c.nodes[0]
	v.hold(n)
	c.start()
	value := strings.Repeat("x", 900<<10)
	for i := range 20 {
		n.put(t, "app", fmt.Sprint("k", i), value)
	}
	until(t, 15*time.Second, func() error {
		if len(snapshots(t, n)) == 0 {
			return errors.New("no snapshot is taken")
		}
		return nil
	})
	n.kill()
	otherBoot(t, n)
	if err := os.Remove(filepath.Join(n.data, "state.db")); err != nil {
		t.Fatal(err)
	}
	v.fill(1 << 20)
	n.start()
	line := n.fails(t, 10*time.Second)
	names(t, line, "no space left on device", checkDisk)
	if strings.Contains(line, "move") {
		t.Errorf("on a full disk it says %q", line)
	}
	v.empty()
	n.start()
	c.ready()
	verify(c)
}

// TestSnapshotWithoutRoom: a follower whose disk has no room for a snapshot takes none, stays up, and
// takes no part of the room that the state needs.
func TestSnapshotWithoutRoom(t *testing.T) {
	long(t)
	v := newVolume(t, 1024)
	c := newCluster(t, 3, with("Storage", "MinFreeMiB", 40))
	f := c.nodes[2]
	v.hold(f)
	c.expects = append(c.expects, "snapshot not taken", "disk is nearly full", "failed to appendEntries", "failed to heartbeat", "pipeline", "failed to install snapshot", "failed to send snapshot")
	c.start()
	if c.leader() == f {
		f.stop()
		c.leader()
		f.start()
		c.ready()
	}
	value := strings.Repeat("x", 500<<10)
	for i := range 100 {
		c.leader().put(t, "app", fmt.Sprint("k", i), fmt.Sprint(i, value))
	}
	c.converge()
	v.fill(110 << 20)
	for i := range 100 {
		c.leader().put(t, "app", fmt.Sprint("k", i), fmt.Sprint("again ", i, value))
	}
	until(t, 20*time.Second, func() error {
		if !strings.Contains(f.logged(), "snapshot not taken") && !strings.Contains(f.logged(), "entries are refused") {
			return errors.New("it had room all the time")
		}
		return nil
	})
	time.Sleep(5 * time.Second) // the fault's length
	part, err := filepath.Glob(filepath.Join(f.data, "snapshots", "*.tmp"))
	if !f.running() || err != nil || len(part) > 0 || v.free() < 8<<20 {
		t.Errorf("running: %v; %v is left, %d bytes are free", f.running(), part, v.free())
	}
	v.empty()
	verify(c)
}

// TestDamagedSnapshotOnLeader: a leader whose snapshot is damaged does not send it for ever to a node
// that needs it. It ends and names the file, and another one that leads sends its own.
func TestDamagedSnapshotOnLeader(t *testing.T) {
	long(t)
	c := startCluster(t, 3)
	leader := c.leader()
	value := strings.Repeat("x", 200<<10)
	// The second one cuts the log behind the first, and what is written meanwhile makes none due.
	for i := 0; strings.Count(leader.logged(), "raft: snapshot complete") < 2; i++ {
		leader.put(t, "app", fmt.Sprint("k", i%3), fmt.Sprint(i, value))
	}
	c.converge()
	c.expects = append(c.expects, "snapshot")
	for _, dir := range snapshots(t, leader) {
		path := filepath.Join(dir, "state.bin")
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b[20000] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := c.followers()[0]
	f.kill()
	if err := os.RemoveAll(f.data); err != nil {
		t.Fatal(err)
	}
	f.start()
	names(t, leader.fails(t, 15*time.Second), "snapshots/", "CRC", "move this node's data directory away")
	// The other two are no majority that may vote while one of them is caught up. So it starts again, as
	// often as it leads, until another one does.
	until(t, 30*time.Second, func() error {
		if !leader.running() {
			leader.start()
		}
		if _, st, err := f.status(); err != nil || st.Role != "follower" && st.Role != "leader" {
			return fmt.Errorf("%s is %+v, %v", f.id, st, err)
		}
		return f.ready()
	})
	leader.kill()
	if err := os.RemoveAll(leader.data); err != nil {
		t.Fatal(err)
	}
	leader.start()
	c.ready()
	verify(c)
}
