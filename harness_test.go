package main

// The tests of this file's neighbours run the real thing: every node is a
// process of its own, started from a configuration file, spoken to over
// loopback, killed by signals. Nothing here looks into the program; names of
// members and headers are those of the contract, restated by hand.

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// The keys every test cluster knows. No log line of any node may hold them.
const (
	adminKey  = "cm_test_admin_Zk3vT9qWx1LmNp7R" // principal ops@test
	readerKey = "cm_test_reader_Bd8sHy2FjKc5GtQ" // principal svc@test
)

// goroutinesLine begins the line by which a node of the tests answers SIGUSR1.
const goroutinesLine = "goroutines: "

// The secret of every test cluster of more than one node, so that whatever is tested is tested with
// TLS between the nodes. No log line may hold it either.
const clusterSecret = "nQ1uZ7cXf0vK3tYb8mHdLw5RgPjE2sAoI9xVyUeT6kM"

// plaintext is the edit for clusters whose nodes talk in plain text.
func plaintext(doc map[string]any) { delete(doc["Cluster"].(map[string]any), "Secret") }

// manualNode is the CONFMAN_NODE of nodes that the manual's commands start: their end is that of the
// namespace in which they run.
const manualNode = "manual"

// TestMain lets the test binary be a node. node.start runs it again with
// CONFMAN_NODE set; main then sees an ordinary command line. A node reads
// standard input only to notice that the tests are gone, however they went.
func TestMain(m *testing.M) {
	if id := os.Getenv("CONFMAN_NODE"); id != "" {
		go func() {
			if id != manualNode {
				io.Copy(io.Discard, os.Stdin)
				os.Exit(3)
			}
		}()
		count := make(chan os.Signal, 1)
		signal.Notify(count, syscall.SIGUSR1)
		go func() {
			for range count {
				fmt.Fprintf(os.Stderr, "%s%d\n", goroutinesLine, runtime.NumGoroutine())
			}
		}()
		main()
		os.Exit(0)
	}
	// Most tests wait most of the time, for an election or a fault's length: one more at once than there
	// are cores takes a fifth of the time off. -parallel says otherwise. The race detector keeps
	// the cores busy by itself.
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given && !raced {
		flag.Set("test.parallel", strconv.Itoa(runtime.GOMAXPROCS(0)+1))
	}
	code := m.Run()
	// A request whose failure its test expects, or takes for a node's, may have failed by this.
	undocumented.Lock()
	for _, err := range undocumented.all {
		fmt.Println(err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// limit is how long the program may take for what d is ordered for. The race
// detector makes it several times slower, and nobody ordered figures for that.
func limit(d time.Duration) time.Duration {
	if raced {
		return 4 * d
	}
	return d
}

// raced says that this binary, and so every node, has the race detector in it.
var raced = func() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}()

// until calls f every 20ms until it returns nil. It fails the test, with f's
// last complaint, when that takes longer than d.
func until(tb testing.TB, d time.Duration, f func() error) {
	tb.Helper()
	deadline := time.Now().Add(d)
	pace := time.NewTicker(20 * time.Millisecond) // the pace of the question, not the answer
	defer pace.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("after %v: %v", d, err)
		}
		<-pace.C
	}
}

// ports are the addresses this process may give to nodes: blocks of numbers
// below the ephemeral range, where no outgoing connection can take one while a
// node restarts. A block belongs to the process that holds the flock of its
// file, so that several runs of the tests at once keep out of each other's way.
var ports struct {
	sync.Mutex            // protects the rest
	next, end  int        // what is left of the newest block
	held       []*os.File // the blocks' locks; they end with the process
}

// portBlock is how many ports one lock covers, and firstPort where they begin:
// above what services on a developer's machine usually hold.
const (
	portBlock = 50
	firstPort = 10_000
)

// freePort returns a port on 127.0.0.1 that is free now and that no other test
// is given.
func freePort(tb testing.TB) int {
	tb.Helper()
	ports.Lock()
	defer ports.Unlock()
	for {
		for ports.next < ports.end {
			port := ports.next
			ports.next++
			ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if err != nil {
				continue // somebody else's
			}
			ln.Close()
			return port
		}
		if err := lockPorts(); err != nil {
			tb.Fatal(err)
		}
	}
}

// lockPorts takes another block. ports is locked.
func lockPorts() error {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return err
	}
	var top int
	if _, err := fmt.Sscan(string(text), &top); err != nil {
		return fmt.Errorf("ip_local_port_range %q: %w", text, err)
	}
	blocks := (top - firstPort) / portBlock
	if blocks < 1 {
		return fmt.Errorf("no ports between %d and the ephemeral range, which begins at %d", firstPort, top)
	}
	for _, block := range rand.Perm(blocks) {
		f, err := lockFile(fmt.Sprintf("ports-%d", block), syscall.LOCK_NB)
		if errors.Is(err, syscall.EWOULDBLOCK) {
			continue
		}
		if err != nil {
			return err
		}
		ports.held = append(ports.held, f)
		ports.next = firstPort + block*portBlock
		ports.end = ports.next + portBlock
		return nil
	}
	return errors.New("every block of ports is taken by another test process")
}

// lockFile takes the lock called name among all test processes of this machine.
// Closing the file gives it back.
func lockFile(name string, how int) (*os.File, error) {
	dir := filepath.Join(os.TempDir(), "confman-test-locks")
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|how); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// An edit changes a configuration document before it is written.
type edit = func(doc map[string]any)

// with returns the edit that sets a member of one of the document's sections.
func with(section, member string, v any) edit {
	return func(doc map[string]any) { doc[section].(map[string]any)[member] = v }
}

// A cluster is the nodes of one configuration file and the directory that
// holds all they write.
type cluster struct {
	tb     testing.TB
	dir    string
	config string // path of the file
	doc    map[string]any
	nodes  []*node

	finished bool     // finish has run
	expects  []string // what lines at level Error may hold
}

// newCluster makes directories, addresses and the configuration file, and
// arranges for finish. It starts nothing.
func newCluster(tb testing.TB, size int, edits ...edit) *cluster {
	tb.Helper()
	c := &cluster{tb: tb, dir: tb.TempDir()}
	c.config = filepath.Join(c.dir, "cluster.json")
	data := filepath.Join(c.dir, "data")

	var members []any
	for i := range size {
		id, api, raft := fmt.Sprintf("node%d", i+1), freePort(tb), freePort(tb)
		members = append(members, map[string]any{"Id": id, "Address": "127.0.0.1", "ApiPort": api, "RaftPort": raft})
		c.nodes = append(c.nodes, &node{
			tb:   tb,
			id:   id,
			api:  fmt.Sprintf("127.0.0.1:%d", api),
			raft: fmt.Sprintf("127.0.0.1:%d", raft),
			url:  fmt.Sprintf("http://127.0.0.1:%d", api),
			data: filepath.Join(data, id),
			args: []string{"-config", c.config, "-node", id},
			cwd:  c.dir,
			out:  filepath.Join(c.dir, id+".out"),
			log:  filepath.Join(c.dir, id+".log"),
		})
	}
	c.doc = map[string]any{
		"Cluster": map[string]any{"Nodes": members},
		"Storage": map[string]any{"DataPath": data},
		"Auth": map[string]any{"ApiKeys": []any{
			map[string]any{"Key": adminKey, "Name": "Operators", "Principal": "ops@test", "Role": "admin"},
			map[string]any{"Key": readerKey, "Name": "Service", "Principal": "svc@test", "Role": "reader"},
		}},
	}
	if size > 1 {
		with("Cluster", "Secret", clusterSecret)(c.doc)
	}
	c.configure(edits...)
	tb.Cleanup(c.dispose)
	tb.Cleanup(c.finish) // runs first; whatever it finds, dispose still runs
	return c
}

// configure changes the configuration and writes the file anew. Nodes that run do not notice.
func (c *cluster) configure(edits ...edit) {
	c.tb.Helper()
	for _, e := range edits {
		e(c.doc)
	}
	text, err := json.MarshalIndent(c.doc, "", "  ")
	if err != nil {
		c.tb.Fatal(err)
	}
	if err := os.WriteFile(c.config, text, 0o600); err != nil {
		c.tb.Fatal(err)
	}
}

// addKey returns the edit that adds a key to the configuration; more are members and values in turn.
func addKey(key, name, role string, more ...any) edit {
	k := map[string]any{"Key": key, "Name": name, "Role": role}
	for pair := range slices.Chunk(more, 2) {
		k[pair[0].(string)] = pair[1]
	}
	return func(doc map[string]any) {
		auth := doc["Auth"].(map[string]any)
		auth["ApiKeys"] = append(auth["ApiKeys"].([]any), k)
	}
}

// dropKey returns the edit that takes a key out.
func dropKey(name string) edit {
	return func(doc map[string]any) {
		auth := doc["Auth"].(map[string]any)
		auth["ApiKeys"] = slices.DeleteFunc(slices.Clone(auth["ApiKeys"].([]any)), func(k any) bool { return k.(map[string]any)["Name"] == name })
	}
}

// startCluster starts size nodes and waits until each one answers /health/ready
// with 200, which it does once it knows a leader and has applied what the
// leader had committed.
func startCluster(tb testing.TB, size int, edits ...edit) *cluster {
	tb.Helper()
	c := newCluster(tb, size, edits...)
	c.start()
	return c
}

// start starts every node and waits until all are ready.
func (c *cluster) start() {
	c.tb.Helper()
	for _, n := range c.nodes {
		n.start()
	}
	c.ready()
}

// ready waits until every live node is ready.
func (c *cluster) ready() {
	c.tb.Helper()
	for _, n := range c.live() {
		until(c.tb, 15*time.Second, n.ready)
	}
}

// live returns the nodes whose process runs and is not paused.
func (c *cluster) live() []*node {
	return slices.DeleteFunc(slices.Clone(c.nodes), func(n *node) bool { return n.paused || !n.running() })
}

// leader waits until one live node says that it leads and all others agree.
func (c *cluster) leader() *node {
	c.tb.Helper()
	var leader *node
	until(c.tb, 15*time.Second, func() error {
		leader = nil
		live := c.live()
		var says []string
		for _, n := range live {
			code, st, err := n.status()
			if err != nil {
				return err
			}
			if st.Role == "leader" && code == http.StatusOK {
				leader = n
			}
			says = append(says, st.LeaderID)
		}
		if leader == nil {
			return fmt.Errorf("nobody leads; leaderId is %q", says)
		}
		for i, id := range says {
			if id != leader.id {
				return fmt.Errorf("%s leads, %s says %q does", leader.id, live[i].id, id)
			}
		}
		return nil
	})
	return leader
}

// followers returns the live nodes that do not lead.
func (c *cluster) followers() []*node {
	c.tb.Helper()
	leader := c.leader()
	return slices.DeleteFunc(c.live(), func(n *node) bool { return n == leader })
}

// converge waits until all live nodes show the same revision and hash, and
// returns it. Raft repeats a failed replication after up to 10s, hence 15s.
func (c *cluster) converge() readyDoc {
	c.tb.Helper()
	var first readyDoc
	until(c.tb, 15*time.Second, func() error {
		for i, n := range c.live() {
			_, st, err := n.status()
			if err != nil {
				return err
			}
			if i == 0 {
				first = st
			}
			if st.Revision != first.Revision || st.Hash != first.Hash {
				return fmt.Errorf("%s is at revision %d, hash %q; %s at %d, %q",
					first.Node, first.Revision, first.Hash, st.Node, st.Revision, st.Hash)
			}
		}
		return nil
	})
	return first
}

// finish is how every cluster test ends: the live nodes come to the same
// revision and hash, the trail's hashes are right, the nodes stop cleanly, and
// their state files are equal, bucket by bucket. Nodes that the test left dead
// are not compared.
func (c *cluster) finish() {
	if c.finished || c.tb.Failed() {
		return // a failed test explains itself; dispose shows the logs
	}
	c.finished = true
	for _, n := range c.nodes {
		if n.paused {
			n.resume()
		}
	}
	live := c.live()
	if len(live) > 0 {
		st := c.converge()
		if err := checkTrail(live[0].trail(c.tb, ""), st); err != nil {
			c.tb.Errorf("trail of %s: %v", live[0].id, err)
		}
	}
	for _, n := range live { // all at once, as a machine that shuts down does
		n.signal(syscall.SIGTERM)
	}
	for _, n := range live {
		n.ended()
	}
	for _, n := range live {
		if err := diffState(live[0].data, n.data); err != nil {
			c.tb.Errorf("state of %s and %s: %v", live[0].id, n.id, err)
		}
	}
}

// dispose kills what still runs, looks through what the nodes left on disk and,
// where the test failed, shows it.
func (c *cluster) dispose() {
	for _, n := range c.nodes {
		n.kill()
	}
	for _, n := range c.nodes {
		text := n.logged()
		for _, bad := range []string{"panic:", "fatal error:", "DATA RACE", adminKey, readerKey, clusterSecret} {
			if strings.Contains(text, bad) {
				c.tb.Errorf("the log of %s holds %q", n.id, bad)
			}
		}
		for line := range strings.Lines(text) {
			// What raft calls an error is often another node's end.
			if strings.Contains(line, "level=ERROR") && !strings.Contains(line, `msg="raft: `) &&
				!slices.ContainsFunc(c.expects, func(s string) bool { return strings.Contains(line, s) }) {
				c.tb.Errorf("%s logs an error: %s", n.id, line)
			}
		}
		if err := checkModes(n.data); err != nil {
			c.tb.Error(err)
		}
	}
	if !c.tb.Failed() {
		return
	}
	for _, n := range c.nodes {
		text := n.logged()
		if tail := 32 << 10; len(text) > tail {
			text = "[...]" + text[len(text)-tail:]
		}
		c.tb.Logf("---- %s (%v)\n%s", n.id, n.err, text)
	}
	if dir := os.Getenv("CONFMAN_LOGS"); dir != "" {
		kept := filepath.Join(dir, strings.ReplaceAll(c.tb.Name(), "/", "-"))
		if err := errors.Join(os.RemoveAll(kept), os.MkdirAll(dir, 0o700), os.CopyFS(kept, os.DirFS(c.dir))); err != nil {
			c.tb.Log(err)
		}
	}
}

// checkModes walks a node's data directory: files are 0600, directories 0700,
// from the directory itself down.
func checkModes(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && path == dir {
			return nil // a node that was never started
		}
		if err != nil {
			return err
		}
		st, err := os.Stat(path) // of what a link leads to
		if err != nil {
			return err
		}
		want := fs.FileMode(0o600)
		if d.IsDir() {
			want = 0o700
		}
		if got := st.Mode().Perm(); got != want {
			return fmt.Errorf("%s has mode %04o, want %04o", path, got, want)
		}
		return nil
	})
}

// bucketed is what a transaction and a bucket of bbolt have in common.
type bucketed interface {
	Cursor() *bbolt.Cursor
	Bucket(name []byte) *bbolt.Bucket
}

// diffState compares the state files in two nodes' data directories.
func diffState(a, b string) error {
	var txs []*bbolt.Tx
	for _, dir := range []string{a, b} {
		db, err := bbolt.Open(filepath.Join(dir, "state.db"), 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
		if err != nil {
			return err
		}
		defer db.Close()
		tx, err := db.Begin(false)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		txs = append(txs, tx)
	}
	return diffBuckets("", txs[0], txs[1])
}

// diffBuckets returns the first difference between a and b, which are both
// called path. How far raft has come and what is a node's own business may
// differ: meta's "applied" and "local...". So may how much is left of what was trimmed from the trail.
func diffBuckets(path string, a, b bucketed) error {
	var cut []byte // the place of the newest event that was trimmed
	if meta := a.Bucket([]byte("meta")); meta != nil {
		if rec := meta.Get([]byte("cut")); rec != nil {
			cut = rec[4:14]
		}
	}
	return diffBelow(path, cut, a, b)
}

// diffBelow is diffBuckets where the cut is known; nil for none.
func diffBelow(path string, cut []byte, a, b bucketed) error {
	own := func(key []byte) bool {
		return path == "/meta" && (string(key) == "applied" || bytes.HasPrefix(key, []byte("local"))) ||
			path == "/trail" && bytes.Compare(key, cut) <= 0
	}
	ca, cb := a.Cursor(), b.Cursor()
	ka, va := ca.First()
	kb, vb := cb.First()
	for ka != nil || kb != nil {
		switch {
		case ka != nil && own(ka):
			ka, va = ca.Next()
			continue
		case kb != nil && own(kb):
			kb, vb = cb.Next()
			continue
		case ka == nil || kb == nil || !bytes.Equal(ka, kb):
			return fmt.Errorf("in %s/, one has key %q where the other has %q", path, ka, kb)
		case (va == nil) != (vb == nil):
			return fmt.Errorf("%s/%q is a bucket in one and a value in the other", path, ka)
		case va == nil:
			if err := diffBelow(path+"/"+string(ka), cut, a.Bucket(ka), b.Bucket(kb)); err != nil {
				return err
			}
		case !bytes.Equal(va, vb):
			return fmt.Errorf("%s/%q is %.300q in one and %.300q in the other", path, ka, va, vb)
		}
		ka, va = ca.Next()
		kb, vb = cb.Next()
	}
	return nil
}

// A node is one process of the cluster under test.
type node struct {
	tb   testing.TB
	id   string
	url  string // of the API, as it stands in Location
	api  string // host:port
	raft string
	data string   // its own data directory
	cwd  string   // where it runs
	args []string // the same for every start: addresses and directory survive
	env  []string // besides what the tests have themselves
	out  string   // file of its standard output, over all starts
	log  string   // file of its standard error, over all starts

	cmd    *exec.Cmd
	gone   chan struct{} // closed when the process has been waited for; nil before the first start
	err    error         // valid once gone is closed
	paused bool
}

// start runs the node and returns at once; ready tells when it serves.
func (n *node) start() {
	n.tb.Helper()
	exe, err := os.Executable()
	if err != nil {
		n.tb.Fatal(err)
	}
	cmd := exec.Command(exe, n.args...)
	cmd.Dir = n.cwd
	cmd.Env = append(os.Environ(), "CONFMAN_NODE="+n.id, "GORACE=halt_on_error=1")
	cmd.Env = append(cmd.Env, n.env...)
	for _, to := range []struct {
		w    *io.Writer
		path string
	}{{&cmd.Stdout, n.out}, {&cmd.Stderr, n.log}} {
		// A file, not a pipe: nobody here has to be awake for the node to write.
		f, err := os.OpenFile(to.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			n.tb.Fatal(err)
		}
		defer f.Close()
		*to.w = f
	}
	if _, err := cmd.StdinPipe(); err != nil { // held open until Wait or our death
		n.tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.tb.Fatal(err)
	}
	gone := make(chan struct{})
	n.cmd, n.gone, n.paused = cmd, gone, false
	go func() {
		n.err = cmd.Wait()
		close(gone)
	}()
}

// running says whether the process is there, paused or not.
func (n *node) running() bool {
	if n.gone == nil {
		return false
	}
	select {
	case <-n.gone:
		return false
	default:
		return true
	}
}

// signal sends sig and does not wait.
func (n *node) signal(sig os.Signal) {
	n.tb.Helper()
	if err := n.cmd.Process.Signal(sig); err != nil {
		n.tb.Errorf("%v to %s: %v", sig, n.id, err)
	}
}

// The lines by which a node says what came of SIGHUP.
const (
	readAgain    = `msg="configuration file read again"`
	notReadAgain = `msg="the configuration file has a mistake; what was read before stays in effect"`
)

// reload has the node read its configuration again and returns what it logs of that.
func (n *node) reload() (lines string) {
	n.tb.Helper()
	before := len(n.logged())
	n.signal(syscall.SIGHUP)
	until(n.tb, 10*time.Second, func() error {
		if lines = n.logged()[before:]; !strings.Contains(lines, readAgain) && !strings.Contains(lines, notReadAgain) {
			return fmt.Errorf("%s does not say that it has read its configuration again", n.id)
		}
		return nil
	})
	return lines
}

// ended expects the process to end within ten seconds with exit status 0.
func (n *node) ended() {
	n.tb.Helper()
	select {
	case <-n.gone:
		if n.err != nil {
			n.tb.Errorf("%s ended with %v, want exit status 0", n.id, n.err)
		}
	case <-time.After(10 * time.Second):
		n.tb.Errorf("%s still runs 10s after it was told to stop", n.id)
	}
}

// stop is a clean end: SIGTERM, exit status 0 within ten seconds.
func (n *node) stop() {
	n.tb.Helper()
	n.signal(syscall.SIGTERM)
	n.ended()
}

// kill is the power cord. It waits until the process is gone.
func (n *node) kill() {
	if n.gone == nil {
		return // never started
	}
	n.cmd.Process.Kill() // an error says that it is gone already
	<-n.gone
	n.paused = false
}

// pause stops the process where it stands, as a stalled machine does; its
// connections stay open. resume lets it go on.
func (n *node) pause() {
	n.tb.Helper()
	n.signal(syscall.SIGSTOP)
	n.paused = true
}

// resume ends a pause.
func (n *node) resume() {
	n.tb.Helper()
	n.signal(syscall.SIGCONT)
	n.paused = false
}

// logged returns what the node has written to standard error so far.
func (n *node) logged() string {
	text, err := os.ReadFile(n.log)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.tb.Error(err)
	}
	return string(text)
}

// readyDoc is the answer of /health/ready, whatever its status.
type readyDoc struct {
	Status, Node, Role, Leader, LeaderID, Hash, Transport, Reason string
	Term, Revision                                                uint64
	StalenessMs                                                   int64
}

// status asks /health/ready once.
func (n *node) status() (code int, st readyDoc, err error) {
	a, err := do("GET", n.url+"/health/ready", "", "")
	if err != nil {
		return 0, st, err
	}
	if err := json.Unmarshal(a.body, &st); err != nil {
		return 0, st, fmt.Errorf("%s: /health/ready: %v in %q", n.id, err, a.body)
	}
	return a.status, st, nil
}

// ready returns nil when the node says that it is ready.
func (n *node) ready() error {
	code, st, err := n.status()
	if err != nil {
		if !n.running() {
			return fmt.Errorf("%s has ended: %v", n.id, n.err)
		}
		return err
	}
	if code != http.StatusOK {
		return fmt.Errorf("%s: /health/ready: %d %+v", n.id, code, st)
	}
	// One that came later than the others could wait for has its vote a moment after it is ready.
	if st.Role == "nonvoter" {
		return fmt.Errorf("%s has no vote yet: %+v", n.id, st)
	}
	return nil
}

// An answer is a response, read to its end.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// slug returns the last part of a problem's type, "" for what is no problem.
func (a *answer) slug() string {
	var p struct{ Type string }
	json.Unmarshal(a.body, &p) // what is not JSON has no type
	slug, _ := strings.CutPrefix(p.Type, "https://confman/errors/")
	return slug
}

// String shows an answer in a test's complaint.
func (a *answer) String() string { return fmt.Sprintf("%d %.500s", a.status, a.body) }

// client takes a redirect for an answer; following goes where it points, as
// curl -L does. Both give up after ten seconds: no request of these tests is
// allowed to take longer.
var (
	transport = &http.Transport{MaxIdleConnsPerHost: 128, IdleConnTimeout: 5 * time.Second,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} // tests about certificates look at them themselves
	client = &http.Client{
		Transport:     transport,
		Timeout:       10 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	following = &http.Client{Transport: transport, Timeout: 10 * time.Second}
)

// do sends one request and reads the answer. key is the API key, none if empty;
// headers are names and values in turn. Redirects are not followed. An answer that openapi.json does not
// allow comes with an error.
func do(method, url, key, body string, headers ...string) (*answer, error) {
	return doWith(client, method, url, key, body, headers...)
}

// doWith is do with a client of the caller's choice.
func doWith(c *http.Client, method, url, key, body string, headers ...string) (*answer, error) {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	if key != "" {
		req.Header.Set("X-API-Key", key)
	}
	for pair := range slices.Chunk(headers, 2) {
		if req.Header.Set(pair[0], pair[1]); pair[0] == "Host" {
			req.Host = pair[1]
		}
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.Close {
		resp.Header.Set("Connection", "close") // Go's client takes it out
	}
	a := &answer{resp.StatusCode, resp.Header, text}
	return a, documented(resp.Request.Method, resp.Request.URL.RequestURI(), a)
}

// ask sends a request to the node as the administrator and follows redirects.
// It fails the test when there is no answer.
func (n *node) ask(tb testing.TB, method, path, body string, headers ...string) *answer {
	tb.Helper()
	a, err := doWith(following, method, n.url+path, adminKey, body, headers...)
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

// write is ask for a change. It is asked again while the answer is that nothing
// was applied: an election may come at any time.
func (n *node) write(tb testing.TB, method, path, body string) (a *answer) {
	tb.Helper()
	until(tb, 10*time.Second, func() error {
		if a = n.ask(tb, method, path, body); a.status == http.StatusServiceUnavailable {
			return fmt.Errorf("%s %s at %s: %v", method, path, n.id, a)
		}
		return nil
	})
	return a
}

// entryDoc is an entry as the API shows it.
type entryDoc struct {
	Namespace, Key, Value, Type, UpdatedAt, UpdatedBy string
	Version, Revision                                 uint64
}

// keyPath is the path of an entry.
func keyPath(ns, key string) string {
	parts := strings.Split(key, "/")
	for i := range parts {
		parts[i] = url.PathEscape(parts[i])
	}
	return "/api/v1/config/" + ns + "/" + strings.Join(parts, "/")
}

// put sets a key through this node, which may send us on to the leader.
func (n *node) put(tb testing.TB, ns, key, value string) (e entryDoc) {
	tb.Helper()
	body, err := json.Marshal(map[string]string{"value": value})
	if err != nil {
		tb.Fatal(err)
	}
	a := n.write(tb, "PUT", keyPath(ns, key), string(body))
	if a.status != http.StatusOK && a.status != http.StatusCreated {
		tb.Fatalf("PUT %s/%s at %s: %v", ns, key, n.id, a)
	}
	if err := json.Unmarshal(a.body, &e); err != nil {
		tb.Fatalf("PUT %s/%s at %s: %v in %v", ns, key, n.id, err, a)
	}
	return e
}

// get reads a key from this node's own state, as old as that may be.
func (n *node) get(tb testing.TB, ns, key string) (e entryDoc) {
	tb.Helper()
	a := n.ask(tb, "GET", keyPath(ns, key)+"?stale", "")
	if a.status != http.StatusOK {
		tb.Fatalf("GET %s/%s at %s: %v", ns, key, n.id, a)
	}
	if err := json.Unmarshal(a.body, &e); err != nil {
		tb.Fatalf("GET %s/%s at %s: %v in %v", ns, key, n.id, err, a)
	}
	return e
}

// delete removes a key through this node.
func (n *node) delete(tb testing.TB, ns, key string) {
	tb.Helper()
	if a := n.write(tb, "DELETE", keyPath(ns, key), ""); a.status != http.StatusNoContent {
		tb.Fatalf("DELETE %s/%s at %s: %v", ns, key, n.id, a)
	}
}

// eventDoc is an audit event; raw is the text it was read from.
type eventDoc struct {
	ID, Timestamp, Action, Actor, Namespace, Key, Type, CorrelationID, Source, Hash string
	Revision, Version                                                               uint64
	OldValue, NewValue                                                              *string

	raw string
}

// items reads a list of the API to its end, page by page.
func (n *node) items(tb testing.TB, path string, query url.Values) (all []json.RawMessage) {
	tb.Helper()
	query = maps.Clone(query)
	for {
		a := n.ask(tb, "GET", path+"?"+query.Encode(), "")
		var page struct {
			Items      []json.RawMessage
			Pagination struct {
				HasMore    bool
				NextCursor *string
			}
		}
		if err := json.Unmarshal(a.body, &page); err != nil || a.status != http.StatusOK {
			tb.Fatalf("GET %s?%s at %s: %v (%v)", path, query.Encode(), n.id, a, err)
		}
		all = append(all, page.Items...)
		if page.Pagination.HasMore != (page.Pagination.NextCursor != nil) {
			tb.Fatalf("GET %s at %s: hasMore and nextCursor disagree: %+v", path, n.id, page.Pagination)
		}
		if page.Pagination.NextCursor == nil {
			return all
		}
		query.Set("cursor", *page.Pagination.NextCursor)
	}
}

// trail reads the audit trail of a namespace, of all if ns is empty, from this
// node's own state: oldest event first.
func (n *node) trail(tb testing.TB, ns string) []eventDoc {
	tb.Helper()
	path := "/api/v1/audit"
	if ns != "" {
		path += "/" + ns
	}
	raws := n.items(tb, path, url.Values{"limit": {"1000"}, "stale": {""}})
	events := make([]eventDoc, len(raws))
	for i, raw := range raws {
		e := &events[len(raws)-1-i]
		if err := json.Unmarshal(raw, e); err != nil {
			tb.Fatalf("%v in event %s", err, raw)
		}
		e.raw = string(raw)
	}
	return events
}

// checkTrail recomputes the hashes of a whole trail the way a stranger would:
// SHA-256 of the previous event's hash (64 zeros before the first, or what the newest
// audit.trim names), a newline, and the event's text without its last member, which is the hash. No revision
// is missing, none is there twice, no time goes back, and the last hash is the
// one the node shows.
func checkTrail(events []eventDoc, st readyDoc) error {
	last := eventDoc{Hash: strings.Repeat("0", 64)}
	for _, e := range slices.Backward(events) {
		if e.Action != "audit.trim" {
			continue
		}
		var cut struct {
			Through uint64
			Hash    string
		}
		if err := json.Unmarshal([]byte(*e.NewValue), &cut); err != nil {
			return fmt.Errorf("event %s: %v", e.raw, err)
		}
		last = eventDoc{Revision: cut.Through, Hash: cut.Hash}
		break
	}
	index := 0
	for _, e := range events {
		if index++; e.Revision != last.Revision {
			index = 0
			// A cluster that is made from a backup leaves numbers out.
			if e.Revision != last.Revision+1 && (e.Action != "store.restore" || e.Revision < last.Revision) {
				return fmt.Errorf("revision %d follows %d", e.Revision, last.Revision)
			}
		}
		if want := fmt.Sprintf("%d-%d", e.Revision, index); e.ID != want {
			return fmt.Errorf("event %q stands where %q belongs", e.ID, want)
		}
		if e.Timestamp < last.Timestamp {
			return fmt.Errorf("event %s is of %s, the one before of %s", e.ID, e.Timestamp, last.Timestamp)
		}
		text, ok := strings.CutSuffix(e.raw, `,"hash":"`+e.Hash+`"}`)
		if !ok {
			return fmt.Errorf("event %s does not end in its hash: %s", e.ID, e.raw)
		}
		sum := sha256.Sum256([]byte(last.Hash + "\n" + text + "}"))
		if got := hex.EncodeToString(sum[:]); got != e.Hash {
			return fmt.Errorf("event %s has hash %s, its text gives %s: %s", e.ID, e.Hash, got, e.raw)
		}
		last = e
	}
	if last.Revision != st.Revision {
		return fmt.Errorf("the trail ends at revision %d, %s is at %d", last.Revision, st.Node, st.Revision)
	}
	if len(events) > 0 && last.Hash != st.Hash {
		return fmt.Errorf("the trail ends with hash %s, %s shows %s", last.Hash, st.Node, st.Hash)
	}
	return nil
}
