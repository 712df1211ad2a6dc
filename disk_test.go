package main

// What happens to disks: they fill up, fail, lose their power and hang.

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// long skips a test that takes minutes.
func long(tb testing.TB) {
	tb.Helper()
	if os.Getenv("CONFMAN_LONG") == "" {
		tb.Skip("takes minutes; set CONFMAN_LONG=1")
	}
}

// fails waits until the process ends by itself with exit status 1 and returns the last line of
// its log, which is to name what failed and what to do. It is gone for the harness, too.
func (n *node) fails(tb testing.TB, d time.Duration) (line string) {
	tb.Helper()
	select {
	case <-n.gone:
	case <-time.After(d):
		tb.Fatalf("%s still runs after %v", n.id, d)
	}
	if code := n.cmd.ProcessState.ExitCode(); code != 1 {
		tb.Errorf("%s ended with %v, want exit status 1", n.id, n.err)
	}
	lines := strings.Split(strings.TrimSpace(n.logged()), "\n")
	line = lines[len(lines)-1]
	if !strings.HasPrefix(line, "confman: ") {
		tb.Errorf("the last line of %s is not the reason: %s", n.id, line)
	}
	tb.Logf("%s: %s", n.id, line)
	return line
}

// names complains unless a message names all of want.
func names(tb testing.TB, line string, want ...string) {
	tb.Helper()
	for _, w := range want {
		if !strings.Contains(line, w) {
			tb.Errorf("%q does not name %q", line, w)
		}
	}
}

// A meter makes writes at the leader, without pause, and notes how long each took.
type meter struct {
	tb   testing.TB
	quit chan struct{}
	wg   sync.WaitGroup

	mu   sync.Mutex // protects took
	took []time.Duration
}

// startMeter begins; n must lead until end.
func startMeter(tb testing.TB, n *node, clients int) *meter {
	m := &meter{tb: tb, quit: make(chan struct{})}
	tb.Cleanup(m.end)
	for i, w := range newFleet(tb, n.api, clients) {
		m.wg.Go(func() {
			r := newPut()
			for op := i; ; op += clients {
				select {
				case <-m.quit:
					return
				default:
				}
				start := time.Now()
				if err := w.exchange(r.with(op%1000, op+1)); err != nil || w.status/100 != 2 {
					tb.Errorf("write %d: status %d, %v", op, w.status, err)
					return
				}
				m.mu.Lock()
				m.took = append(m.took, time.Since(start))
				m.mu.Unlock()
			}
		})
	}
	return m
}

// take returns the samples since the last call, sorted.
func (m *meter) take() []time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	took := m.took
	m.took = nil
	slices.Sort(took)
	return took
}

// enough is take once there are as many samples as a p99 needs, however slow the machine is.
func (m *meter) enough() []time.Duration {
	m.tb.Helper()
	until(m.tb, limit(20*time.Second), func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.took) < 100 {
			return fmt.Errorf("%d writes are too few to compare", len(m.took))
		}
		return nil
	})
	return m.take()
}

func (m *meter) end() {
	select {
	case <-m.quit:
	default:
		close(m.quit)
	}
	m.wg.Wait()
}

// TestDiskFull fills the leader's disk, and then a follower's, below MinFreeMiB.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	const (
		floor = 64 << 20
		below = 40 << 20 // what is left: a disk fills up little by little, and free space is looked at each second
	)
	vols := map[string]*volume{}
	for i := range 3 {
		vols[fmt.Sprintf("node%d", i+1)] = newVolume(t, 512)
	}
	c := newCluster(t, 3, steady, with("Storage", "MinFreeMiB", floor>>20))
	c.expects = []string{"disk is nearly full"}
	for _, n := range c.nodes {
		vols[n.id].hold(n)
	}
	c.start()

	leader := c.leader()
	was := leader.put(t, "app", "k", "with room")
	for i := range 50 {
		leader.put(t, "app", fmt.Sprintf("old%d", i), "x")
	}
	vols[leader.id].fill(below)
	refused := func(method, path, body string) error {
		a, err := do(method, leader.url+path, adminKey, body)
		if err != nil {
			return err
		}
		var p struct{ Outcome string }
		if json.Unmarshal(a.body, &p) != nil || a.status != http.StatusInsufficientStorage || a.slug() != "no-space" || p.Outcome != "not-applied" {
			return fmt.Errorf("%s %s on a full disk: %v", method, path, a)
		}
		return nil
	}
	until(t, 5*time.Second, func() error {
		return refused("PUT", keyPath("app", "probe"), `{"value":"`+strconv.FormatInt(time.Now().UnixNano(), 10)+`"}`)
	})
	if !strings.Contains(leader.logged(), "disk is nearly full: a leader takes deletes only") {
		t.Errorf("%s does not say that its disk is nearly full", leader.id)
	}
	for _, m := range []struct{ method, path, body string }{
		{"PUT", keyPath("app", "k"), `{"value":"without"}`},
		{"PUT", keyPath("app", "new"), `{"value":"without"}`},
		{"PATCH", "/api/v1/config/app", `{"k":"without","old0":null}`},
		{"PUT", "/api/v1/namespaces/other", `{"description":"d"}`},
	} {
		if err := refused(m.method, m.path, m.body); err != nil {
			t.Error(err)
		}
	}
	for _, query := range []string{"", "?consistent"} {
		a := leader.ask(t, "GET", keyPath("app", "k")+query, "")
		var e entryDoc
		if json.Unmarshal(a.body, &e) != nil || e != was {
			t.Errorf("GET%s on a full disk: %v, want %+v", query, a, was)
		}
	}
	for i := range 50 {
		if a, err := do("DELETE", leader.url+keyPath("app", fmt.Sprintf("old%d", i)), adminKey, ""); err != nil || a.status != http.StatusNoContent {
			t.Fatalf("DELETE on a full disk: %v, %v", a, err)
		}
	}
	vols[leader.id].empty()
	start := time.Now()
	until(t, 5*time.Second, func() error {
		if a := leader.ask(t, "PUT", keyPath("app", "k"), `{"value":"with room again"}`); a.status != http.StatusOK {
			return fmt.Errorf("PUT with room again: %v", a)
		}
		return nil
	})
	t.Logf("the leader takes writes %v after it has room", time.Since(start).Round(time.Millisecond))

	leader, f := c.leader(), c.followers()[0]
	m := startMeter(t, leader, 8)
	time.Sleep(2 * time.Second) // what is normal here
	normal := m.enough()
	vols[f.id].fill(below)
	until(t, 5*time.Second, func() error {
		if !strings.Contains(f.logged(), "disk is nearly full: entries are refused") {
			return fmt.Errorf("%s does not say that its disk is nearly full", f.id)
		}
		return nil
	})
	m.take()
	time.Sleep(time.Duration(rounds(4, 15)) * time.Second) // the fault's length
	full := m.enough()
	at, err := revision(f)
	if want, err2 := revision(leader); err != nil || err2 != nil || at >= want {
		t.Errorf("%s, whose disk is full, is at revision %d of %d (%v, %v)", f.id, at, want, err, err2)
	}
	vols[f.id].empty()
	m.end()
	start = time.Now()
	until(t, limit(15*time.Second), func() error {
		want, err := revision(leader)
		if err != nil {
			return err
		}
		if got, err := revision(f); err != nil || got < want {
			return fmt.Errorf("revision %d of %d, %v", got, want, err)
		}
		return f.ready()
	})
	t.Logf("%s has caught up %v after it has room, %d revisions", f.id, time.Since(start).Round(time.Millisecond), len(full))
	for _, m := range []struct {
		q     float64
		noise time.Duration // what is shorter is the machine's, not the follower's; of the p99, what is ordered
	}{{0.50, 20 * time.Millisecond}, {0.99, 100 * time.Millisecond}} {
		before, during := quantile(normal, m.q), quantile(full, m.q)
		t.Logf("p%.0f of a write %v before (%d writes), %v while the disk is full (%d)", 100*m.q, before, len(normal), during, len(full))
		if during > limit(max(2*before, m.noise)) {
			t.Errorf("p%.0f of a write is %v while a follower's disk is full, %v before", 100*m.q, during, before)
		}
	}
	verify(c)
	for _, n := range c.nodes {
		if got := strings.Count(n.logged(), "state opened"); got != 1 {
			t.Errorf("%s was started %d times", n.id, got)
		}
	}
}

// TestDiskError lets a write meet the end of the disk: the node ends, says which file and what
// to do, and has lost nothing once there is room.
func TestDiskError(t *testing.T) {
	t.Parallel()
	large := strings.Repeat("x", 900<<10)
	for _, m := range []struct {
		file  string
		leave int64
		body  string // of a PATCH; what it needs in the log is less than in the state
	}{
		{"raft.db", 1<<20 + 512<<10, `{"a":"` + large + `","b":"` + large + `"}`},
		{"state.db", 1<<20 + 512<<10, `{"a":"` + large + `"}`},
	} {
		t.Run(m.file, func(t *testing.T) {
			v := newVolume(t, 64)
			c := newCluster(t, 1, with("Storage", "MinFreeMiB", 1))
			c.expects = []string{"disk is nearly full"}
			n := c.nodes[0]
			v.hold(n)
			c.start()
			was := n.put(t, "app", "k", "acknowledged")
			v.fill(m.leave)
			a, err := do("PATCH", n.url+"/api/v1/config/app", adminKey, m.body)
			if err == nil && a.status != http.StatusGatewayTimeout {
				t.Errorf("a write that met the end of the disk: %v", a)
			}
			line := n.fails(t, 15*time.Second)
			names(t, line, filepath.Join(n.data, m.file), "no space", "; ")
			v.empty()
			n.start()
			c.ready()
			if got := n.get(t, "app", "k"); got != was {
				t.Errorf("after it all %+v, want %+v", got, was)
			}
			n.put(t, "app", "k", "with room again")
			verify(c)
		})
	}
}

// opened returns what the node's last start said of its state file.
func (n *node) opened() string {
	how := ""
	for line := range strings.Lines(n.logged()) {
		if _, rest, ok := strings.Cut(line, `msg="state opened"`); ok {
			how = rest
		}
	}
	return how
}

// TestStateKept: the state file is kept after a clean stop and after a kill; after an unclean
// stop of the machine, here another boot id in state.mark, it may be anything and is made anew.
func TestStateKept(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	load := startLoad(c, 8)
	load.more(limit(10*time.Second), 300)
	n := c.followers()[0]
	again := func(want string) {
		t.Helper()
		n.start()
		c.ready()
		if how := n.opened(); !strings.Contains(how, want) || !strings.Contains(how, "took=") {
			t.Errorf("want %q, the log says %s", want, how)
		}
		load.more(limit(5*time.Second), 50)
	}
	n.stop()
	again("kept after a clean stop")
	n.kill()
	again("kept after a killed process")
	n.kill()
	otherBoot(t, n)
	path := filepath.Join(n.data, "state.db")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		b[i] ^= 0x55
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	again("rebuilding after an unclean stop")
	until(t, 5*time.Second, func() error {
		if _, rest, ok := strings.Cut(n.logged(), `msg="log applied"`); !ok || !strings.Contains(rest, " took=") {
			return errors.New("the log does not say when the state was built anew")
		}
		return nil
	})

	// And all at once: nobody has a state file to help the others with.
	for _, n := range c.nodes {
		n.kill()
	}
	for _, n := range c.nodes {
		otherBoot(t, n)
		n.start()
	}
	c.ready()
	load.more(limit(5*time.Second), 50)
	prove(load)
}

// TestStateFromSnapshot: a node whose state file is thrown away after an unclean stop takes what the
// log no longer tells it from its snapshot. It is alone, so that no other node can make up for it.
func TestStateFromSnapshot(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	n := c.nodes[0]
	value := strings.Repeat("x", 900<<10)
	for i := range 5 { // a snapshot is taken when the log has grown by 4 MiB
		n.put(t, "app", fmt.Sprintf("k%d", i), value)
	}
	until(t, 15*time.Second, func() error {
		if len(snapshots(t, n)) == 0 {
			return errors.New("no snapshot is taken")
		}
		return nil
	})
	last := n.put(t, "app", "last", "behind the snapshot")
	_, want, err := n.status()
	if err != nil {
		t.Fatal(err)
	}
	n.kill()
	otherBoot(t, n)
	n.start()
	c.ready()
	if how := n.opened(); !strings.Contains(how, "rebuilding after an unclean stop") {
		t.Errorf("the log says of the state %s", how)
	}
	if _, got, err := n.status(); err != nil || got.Revision != want.Revision || got.Hash != want.Hash {
		t.Errorf("the state is at revision %d, hash %s (%v), was at %d, %s", got.Revision, got.Hash, err, want.Revision, want.Hash)
	}
	if got := n.get(t, "app", "k0"); got.Value != value {
		t.Errorf("k0 has %d bytes at revision %d, want %d", len(got.Value), got.Revision, len(value))
	}
	if got := n.get(t, "app", "last"); got != last {
		t.Errorf("last is %+v, want %+v", got, last)
	}
	verify(c)
}

// TestMakeDir: the directories that a node makes are on the disk before anything in them is.
func TestMakeDir(t *testing.T) {
	t.Parallel()
	v := newVolume(t, 64)
	dir := filepath.Join(v.dir, "var", "confman", "node1")
	if err := makeDir(dir); err != nil {
		t.Fatal(err)
	}
	v.cut(cutHard)
	until(t, 30*time.Second, v.remount)
	info, err := os.Stat(dir)
	if err != nil || info.Mode() != fs.ModeDir|0o700 {
		t.Errorf("after a power cut: %v, %v", info, err)
	}
}

// otherBoot makes a stopped node's state.mark that of an earlier start of the machine.
func otherBoot(tb testing.TB, n *node) {
	tb.Helper()
	path := filepath.Join(n.data, "state.mark")
	mark, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		tb.Skip("the system has no boot id")
	}
	other := strings.Replace(string(mark), strings.TrimSpace(string(boot)), "00000000-0000-0000-0000-000000000000", 1)
	if other == string(mark) {
		tb.Fatalf("state.mark of %s does not hold the boot id: %q", n.id, mark)
	}
	if err := os.WriteFile(path, []byte(other), 0o600); err != nil {
		tb.Fatal(err)
	}
}

// TestPowerCut takes the power from one node's disk, or from all, under load.
func TestPowerCut(t *testing.T) {
	long(t)
	r := seeded(t)
	vols := map[string]*volume{}
	for i := range 3 {
		vols[fmt.Sprintf("node%d", i+1)] = newVolume(t, 1024)
	}
	c := newCluster(t, 3, with("Storage", "MinFreeMiB", 16), with("Cluster", "RequestTimeout", 2000))
	for _, n := range c.nodes {
		vols[n.id].hold(n)
	}
	c.start()
	load := startLoad(c, 16)
	var slowest time.Duration
	for round := range 40 {
		load.more(limit(10*time.Second), 50+r.IntN(500))
		victims := c.nodes
		if round%2 == 0 {
			victims = []*node{c.nodes[r.IntN(3)]}
		}
		how := []uint32{cutFlush, cutHard}[r.IntN(2)]
		for _, n := range victims {
			vols[n.id].cut(how)
			n.cmd.Process.Kill() // a machine without power computes nothing
		}
		for _, n := range victims {
			n.kill()
		}
		if len(victims) == 1 {
			load.more(limit(10*time.Second), 20)
		}
		for _, n := range victims {
			until(t, 30*time.Second, vols[n.id].remount)
		}
		start := time.Now()
		for _, n := range victims {
			n.start()
		}
		for _, n := range c.nodes {
			until(t, limit(20*time.Second)-time.Since(start), n.ready)
		}
		took := time.Since(start)
		slowest = max(slowest, took)
		for _, n := range victims {
			if how := n.opened(); !strings.Contains(how, "rebuilding after an unclean stop") {
				t.Errorf("round %d: %s says of its state %s", round, n.id, how)
			}
		}
		t.Logf("round %d: %d of 3 cut (flag %d), ready after %v", round, len(victims), how, took.Round(time.Millisecond))
	}
	t.Logf("ready after %v at most", slowest.Round(time.Millisecond))
	prove(load)
}

// TestDiskStall freezes the leader's disk for 40 s: another leads, and the old one, which
// cannot be of use, ends with a message and rejoins when it is started again.
func TestDiskStall(t *testing.T) {
	long(t)
	vols := map[string]*volume{}
	for i := range 3 {
		vols[fmt.Sprintf("node%d", i+1)] = newVolume(t, 512)
	}
	c := newCluster(t, 3, with("Storage", "MinFreeMiB", 16), with("Cluster", "RequestTimeout", 2000))
	for _, n := range c.nodes {
		vols[n.id].hold(n)
	}
	c.start()
	load := startLoad(c, 8)
	load.more(limit(10*time.Second), 200)
	old, others := c.leader(), c.followers()
	start := time.Now()
	vols[old.id].freeze()
	var frozen atomic.Bool
	frozen.Store(true)
	thaw := func() {
		if frozen.CompareAndSwap(true, false) {
			vols[old.id].thaw()
		}
	}
	t.Cleanup(thaw) // or nothing of it could be killed
	writable(t, others, start, 15*time.Second, "disk frozen")
	until(t, 15*time.Second, func() error {
		if !strings.Contains(old.logged(), "confman: ") {
			return fmt.Errorf("%s says nothing", old.id)
		}
		return nil
	})
	t.Logf("%s has given up after %v", old.id, time.Since(start).Round(time.Millisecond))
	old.paused = true                              // its process cannot go while its disk hangs, but it serves nothing
	load.more(limit(20*time.Second), 20)           // each client that calls the old one waits ten seconds for nothing
	time.Sleep(40*time.Second - time.Since(start)) // the fault's length
	thaw()
	old.paused = false
	names(t, old.fails(t, 10*time.Second), old.data, "hung", "; ")
	start = time.Now()
	old.start()
	c.ready()
	t.Logf("%s is ready again after %v", old.id, time.Since(start).Round(time.Millisecond))
	load.more(limit(5*time.Second), 50)
	prove(load)
}
