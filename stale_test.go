package main

// How old a read can be, by a clock outside: nodes are cut off, paused, and fed
// heartbeats without entries, while one writer's acknowledgements say what a read
// has to know.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// An observer writes one key all the time and reads it everywhere in every form.
type observer struct {
	c      *cluster
	most   time.Duration // MaxStaleness
	value  string        // of every write, with a number before it
	epoch  time.Time     // what the times below count from
	quit   chan struct{}
	wg     sync.WaitGroup
	mu     sync.Mutex // protects the rest
	acked  []acknowledgement
	seen   []sighting
	pauses map[*node][]interval
}

// An acknowledgement says that the key had this revision, or a later one, from then on.
type acknowledgement struct {
	at  time.Duration
	rev uint64
}

// A sighting is the answer to a read.
type sighting struct {
	n      *node
	form   string
	from   time.Duration // when it was sent
	status int
	slug   string
	rev    uint64
	stale  string // Confman-Staleness-Ms
}

// An interval is a time in which a process stood still; end is 0 while it lasts.
type interval struct{ start, end time.Duration }

// readForms are the reads of an observer.
var readForms = []string{"", "?stale", "?consistent"}

// observe begins to write and read the key app/k.
func observe(c *cluster, most time.Duration) *observer {
	c.tb.Helper()
	o := &observer{
		c: c, most: most, epoch: time.Now(), quit: make(chan struct{}), pauses: make(map[*node][]interval),
		value: strings.Repeat("x", 4*bigCall), // so that the call that carries it is a big one
	}
	rev := c.leader().put(c.tb, "app", "k", "0"+o.value).Revision
	c.converge()
	o.note(rev)
	o.wg.Go(func() { o.write(rev) })
	for _, n := range c.nodes {
		for _, form := range readForms {
			o.wg.Go(func() { o.read(n, form) })
		}
	}
	c.tb.Cleanup(o.end) // before the nodes go, if the test has not done it
	return o
}

// bigCall is more than a heartbeat has, and less than an entry with an observer's value.
const bigCall = 1 << 10

// end waits until nobody reads or writes.
func (o *observer) end() {
	select {
	case <-o.quit:
	default:
		close(o.quit)
	}
	o.wg.Wait()
}

func (o *observer) note(rev uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.acked = append(o.acked, acknowledgement{time.Since(o.epoch), rev})
}

// write sets the key again and again, each time only if it is as the last write made
// it: one whose outcome is unknown cannot take effect behind a later one.
func (o *observer) write(rev uint64) {
	hc := &http.Client{Transport: transport, Timeout: time.Second}
	for i := 1; ; i++ {
		select {
		case <-o.quit:
			return
		case <-time.After(5 * time.Millisecond): // the pace of writing
		}
		url := o.c.nodes[i%len(o.c.nodes)].url + keyPath("app", "k")
		a, err := doWith(hc, "PUT", url, adminKey, fmt.Sprintf(`{"value":"%d%s"}`, i, o.value), "If-Match", fmt.Sprintf(`"%d"`, rev))
		if err == nil && a.status == http.StatusPreconditionFailed {
			a, err = doWith(hc, "GET", url+"?consistent", adminKey, "")
		}
		var e entryDoc
		if err != nil || a.status != http.StatusOK || json.Unmarshal(a.body, &e) != nil {
			continue // not made, or not known to be
		}
		rev = e.Revision
		o.note(rev)
	}
}

// read reads the key at n in one form, again and again.
func (o *observer) read(n *node, form string) {
	hc := &http.Client{Transport: transport, Timeout: 8 * time.Second}
	for {
		select {
		case <-o.quit:
			return
		case <-time.After(2 * time.Millisecond): // the pace of reading
		}
		s := sighting{n: n, form: form, from: time.Since(o.epoch)}
		a, err := doWith(hc, "GET", n.url+keyPath("app", "k")+form, readerKey, "")
		if err != nil {
			continue
		}
		s.status, s.stale = a.status, a.header.Get("Confman-Staleness-Ms")
		var e entryDoc
		if a.status != http.StatusOK {
			s.slug = a.slug()
		} else if json.Unmarshal(a.body, &e) == nil {
			s.rev = e.Revision
		}
		o.mu.Lock()
		o.seen = append(o.seen, s)
		o.mu.Unlock()
	}
}

// answered returns how many reads of a form n has answered since a time, and the last of them.
func (o *observer) answered(n *node, form string, since time.Duration) (count int, last sighting) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := len(o.seen) - 1; i >= 0 && o.seen[i].from >= since-o.most; i-- {
		if s := o.seen[i]; s.n == n && s.form == form && s.from >= since {
			if count++; count == 1 {
				last = s
			}
		}
	}
	return count, last
}

// writes waits until n more writes are acknowledged.
func (o *observer) writes(n int) {
	o.c.tb.Helper()
	count := func() int {
		o.mu.Lock()
		defer o.mu.Unlock()
		return len(o.acked)
	}
	want := count() + n
	until(o.c.tb, limit(10*time.Second), func() error {
		if got := count(); got < want {
			return fmt.Errorf("%d writes are acknowledged, want %d", got, want)
		}
		return nil
	})
}

// turns waits until n answers plain reads with a status; a problem has the slug too.
func (o *observer) turns(n *node, status int, slug string) {
	o.c.tb.Helper()
	since := time.Since(o.epoch)
	until(o.c.tb, limit(o.most+10*time.Second), func() error {
		if count, last := o.answered(n, "", since); count == 0 || last.status != status || last.slug != slug {
			return fmt.Errorf("%s answers %d plain reads, the last with %d %s, want %d %s", n.id, count, last.status, last.slug, status, slug)
		}
		return nil
	})
}

// pause stops n and returns when it stands still.
func (o *observer) pause(n *node) {
	o.c.tb.Helper()
	n.pause()
	stoodStill(o.c.tb, n)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pauses[n] = append(o.pauses[n], interval{start: time.Since(o.epoch)})
}

// resume ends n's pause.
func (o *observer) resume(n *node) {
	o.mu.Lock()
	o.pauses[n][len(o.pauses[n])-1].end = time.Since(o.epoch)
	o.mu.Unlock()
	n.resume()
}

// stoodStill waits until every thread of a paused process is stopped: the signal returns
// before it is.
func stoodStill(tb testing.TB, n *node) {
	tb.Helper()
	until(tb, 5*time.Second, func() error {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", n.cmd.Process.Pid))
		if err != nil || len(threads) == 0 {
			return fmt.Errorf("no threads of %s: %v", n.id, err)
		}
		for _, path := range threads {
			text, err := os.ReadFile(path)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			// The state stands behind the name, which is in brackets.
			if i := bytes.LastIndexByte(text, ')'); err != nil || !bytes.HasPrefix(text[i+1:], []byte(" T")) {
				return fmt.Errorf("%s runs: %s (%v)", n.id, text, err)
			}
		}
		return nil
	})
}

// known returns the revision that was acknowledged at a time.
func (o *observer) known(at time.Duration) uint64 {
	i := sort.Search(len(o.acked), func(i int) bool { return o.acked[i].at > at })
	if i == 0 {
		return 0
	}
	return o.acked[i-1].rev
}

// check ends the observation. A read that was answered knows what was acknowledged
// MaxStaleness before it was sent, and as much as its header says; a consistent one
// knows all. What was sent to a node that stood still was read after that.
func (o *observer) check() {
	tb := o.c.tb
	tb.Helper()
	o.end()
	counts := make(map[string]int)
	wrong := 0
	for _, s := range o.seen {
		counts[fmt.Sprint(s.form, " ", s.status)]++
		at := s.from
		for _, p := range o.pauses[s.n] {
			if p.start <= at && at < p.end {
				at = p.end
			}
		}
		ms, err := strconv.ParseInt(s.stale, 10, 64)
		bound := time.Duration(ms) * time.Millisecond
		switch {
		case s.status == http.StatusServiceUnavailable && (s.form == "" && s.slug == "stale-read" || s.form == "?consistent" && (s.slug == "no-leader" || s.slug == "behind")):
			continue
		case s.status != http.StatusOK:
			tb.Errorf("%s answers a read %q with %d %s", s.n.id, s.form, s.status, s.slug)
		case err != nil || ms < -1 || ms < 0 && s.form != "?stale" || s.form == "?consistent" && ms != 0 || s.form == "" && bound > o.most:
			tb.Errorf("%s answers a read %q with Confman-Staleness-Ms %q", s.n.id, s.form, s.stale)
		case ms < 0:
			continue // it cannot say
		case s.rev < o.known(at-bound):
			if wrong++; wrong <= 10 {
				tb.Errorf("%s answered a read %q of %v with revision %d and staleness %v; %d was acknowledged by then",
					s.n.id, s.form, at, s.rev, bound, o.known(at-bound))
			}
		}
	}
	tb.Logf("%d writes acknowledged; reads by form and status: %v", len(o.acked), counts)
	if wrong > 0 {
		tb.Errorf("%d reads are older than they say", wrong)
	}
}

// TestStaleness: whatever keeps a node from hearing of writes, its plain reads are never
// older than MaxStaleness, and every read's header is a bound.
func TestStaleness(t *testing.T) {
	t.Parallel()
	const most = time.Second
	c, roads := newLinked(t, 3, "", nil, plaintext, with("Cluster", "MaxStaleness", most.Milliseconds()), with("Cluster", "RequestTimeout", 2000))
	c.start()
	o := observe(c, most)
	for _, n := range c.nodes {
		o.turns(n, http.StatusOK, "")
	}
	// behind waits until n, which is cut off, says that it is behind, and holds the figures that
	// grow against the time since a write that n cannot know.
	behind := func(n *node, reason string) {
		t.Helper()
		o.writes(2) // the second begins after the first is acknowledged
		cut := time.Since(o.epoch)
		o.turns(n, http.StatusServiceUnavailable, "stale-read")
		first := int64(-1)
		until(t, 10*time.Second, func() error {
			asked := time.Since(o.epoch)
			a, err := do("GET", n.url+keyPath("app", "k")+"?stale", readerKey, "")
			if err != nil {
				return err
			}
			ms, err := strconv.ParseInt(a.header.Get("Confman-Staleness-Ms"), 10, 64)
			if err != nil || a.status != http.StatusOK || time.Duration(ms)*time.Millisecond < asked-cut-time.Millisecond {
				t.Errorf("%s, cut off for more than %v, answers ?stale with %d, Confman-Staleness-Ms %d (%v)", n.id, asked-cut, a.status, ms, err)
			}
			if first < 0 {
				first = ms
			}
			if ms < first+100 {
				return fmt.Errorf("Confman-Staleness-Ms was %d and is %d", first, ms)
			}
			return nil
		})
		code, st, err := n.status()
		if err != nil || code != http.StatusServiceUnavailable || st.Status != "not-ready" || !strings.Contains(st.Reason, reason) || st.StalenessMs <= most.Milliseconds() {
			t.Errorf("%s, cut off, is %d %+v (%v), want 503 and a reason with %q", n.id, code, st, err, reason)
		}
	}
	fresh := func(n *node) {
		t.Helper()
		o.turns(n, http.StatusOK, "")
		until(t, 15*time.Second, n.ready)
	}

	leader, f := c.leader(), c.followers()[0]
	roads.cut(f, true)
	behind(f, "leader")
	roads.cut(f, false)
	fresh(f)

	o.pause(f)
	since := time.Since(o.epoch)
	until(t, 10*time.Second, func() error {
		if count, _ := o.answered(leader, "", since); time.Since(o.epoch) < since+most*3/2 || count < 50 {
			return fmt.Errorf("%d reads since the pause began", count)
		}
		return nil
	})
	o.resume(f)
	fresh(f)

	// Heartbeats pass, entries do not: contact with the leader is perfect.
	leader, f = c.leader(), c.followers()[0]
	_, before, err := f.status()
	if err != nil {
		t.Fatal(err)
	}
	asked := roads.of(f, leader).asked()
	roads.of(leader, f).set(func() { roads.of(leader, f).most = bigCall })
	behind(f, "behind")
	_, st, err := f.status()
	if err != nil || st.LeaderID != leader.id || st.Term != before.Term || st.Role != "follower" {
		t.Errorf("with heartbeats %s is %+v (%v), want a follower of %s in term %d still", f.id, st, err, leader.id, before.Term)
	}
	if now := roads.of(f, leader).asked(); now == asked {
		t.Errorf("%s has not asked %s since it was cut off from entries", f.id, leader.id)
	}
	roads.of(leader, f).set(func() { roads.of(leader, f).most = 0 })
	fresh(f)

	// The leader itself may have been replaced while it was paused.
	o.pause(leader)
	next := c.leader()
	since = time.Since(o.epoch)
	until(t, 10*time.Second, func() error {
		if count, _ := o.answered(next, "?consistent", since); time.Since(o.epoch) < since+most*3/2 || count < 50 {
			return fmt.Errorf("%d reads at the next leader", count)
		}
		return nil
	})
	o.resume(leader)
	fresh(leader)

	// A leader that is cut off.
	leader = c.leader()
	roads.cut(leader, true)
	behind(leader, "leader")
	roads.cut(leader, false)
	fresh(leader)
	o.check()
}

// TestOldAnswers: an answer that grew older than promised while it was made, because the process
// was paused, is not given: neither what is there nor that nothing is.
func TestOldAnswers(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"))
	s := newReader(t, w)
	s.node.log = s.log
	for _, m := range []struct {
		name string
		send func(c *call) error
		want int // in time
	}{
		{"what is there", func(c *call) error { return c.sendJSON(http.StatusOK, []byte(`{}`)) }, 200},
		{"a text", func(c *call) error { return c.sendText([]byte("v")) }, 200},
		{"that it is the same", func(c *call) error { return c.sendNothing(http.StatusNotModified) }, 304},
		{"that nothing is there", func(c *call) error { return errNotFound.because("there is no key") }, 404},
		{"that it is another one", func(c *call) error { return preconditionFailed(nil, "it is another one") }, 412},
		{"that it failed", func(c *call) error { return errors.New("the disk") }, 500},
	} {
		for _, late := range []bool{false, true} {
			rec := httptest.NewRecorder()
			c := s.newCall(rec, httptest.NewRequest("GET", keyPath("app", "k"), nil))
			now := time.Now()
			s.node.freshSince.Store(&now)
			if err := s.fresh(c); err != nil {
				t.Fatal(err)
			}
			want := m.want
			if late {
				// What the node has learned meanwhile does not make younger what was read before.
				then := now.Add(-time.Duration(s.cfg.Cluster.MaxStaleness+1) * time.Millisecond)
				c.since = &then
				now := time.Now()
				s.node.freshSince.Store(&now)
				if want != http.StatusInternalServerError {
					want = http.StatusServiceUnavailable
				}
			}
			c.finish(m.send(c))
			a := &answer{rec.Code, rec.Header(), rec.Body.Bytes()}
			if a.status != want || late && want == 503 && a.slug() != "stale-read" {
				t.Errorf("%s, late %v: %v, want %d", m.name, late, a, want)
			}
		}
	}
}

// TestStartsBehind: a node that starts and has not caught up says so. It answers no plain
// read with what it has, nor with 404 what it has not.
func TestStartsBehind(t *testing.T) {
	t.Parallel()
	c, roads := newLinked(t, 3, "", nil, plaintext, calm, with("Cluster", "RequestTimeout", 1000), with("Cluster", "MaxStaleness", 500))
	c.start()
	late := c.followers()[0]
	others := slices.DeleteFunc(slices.Clone(c.nodes), func(n *node) bool { return n == late })
	c.nodes[0].put(t, "app", "k", "at first")
	c.converge()
	starve := func(starved bool) {
		for _, n := range others {
			l := roads.of(n, late)
			l.set(func() {
				l.most = 0
				if starved {
					l.most = bigCall
				}
			})
		}
	}
	for round := range 2 { // with an old state, then with an empty directory
		late.kill()
		if round == 1 {
			if err := os.RemoveAll(late.data); err != nil {
				t.Fatal(err)
			}
		}
		starve(true)
		want := others[0].put(t, "app", "k", strconv.Itoa(round)+strings.Repeat("x", 4*bigCall))
		late.start()
		reads := []string{keyPath("app", "k"), keyPath("app", "missing"), "/api/v1/config/app", "/api/v1/config/none",
			"/api/v1/namespaces", "/api/v1/namespaces/app/keys", "/api/v1/audit/app", "/api/v1/audit/none"}
		// refused complains unless every plain read is refused.
		refused := func() {
			t.Helper()
			for _, path := range reads {
				if a, err := do("GET", late.url+path, adminKey, ""); err == nil && (a.status != http.StatusServiceUnavailable || a.slug() != "stale-read") {
					t.Fatalf("round %d: %s has not caught up and answers GET %s with %v", round, late.id, path, a)
				}
			}
		}
		leader := c.leaderOf(others)
		asked := roads.of(late, leader).asked()
		until(t, 15*time.Second, func() error {
			refused()
			code, st, err := late.status()
			if err == nil && (code != http.StatusServiceUnavailable || st.Reason == "") {
				t.Fatalf("round %d: %s has not caught up and is ready: %+v", round, late.id, st)
			}
			if now := roads.of(late, leader).asked(); err != nil || st.LeaderID != leader.id || now < asked+2 {
				return fmt.Errorf("it is %+v (%v) and has asked %d times", st, err, now-asked)
			}
			return nil
		})
		if a, err := do("GET", late.url+keyPath("app", "k")+"?stale", readerKey, ""); err != nil || a.header.Get("Confman-Staleness-Ms") != "-1" ||
			round == 0 && a.status != http.StatusOK || round == 1 && a.status != http.StatusNotFound {
			t.Errorf("round %d: ?stale is answered with %v, %v, %v", round, a, a.header, err)
		}
		if a, err := do("GET", late.url+keyPath("app", "k")+"?consistent", readerKey, ""); err != nil || a.slug() != "behind" {
			t.Errorf("round %d: ?consistent is answered with %v, %v", round, a, err)
		}
		refused()
		starve(false)
		until(t, 15*time.Second, func() error {
			a, err := do("GET", late.url+keyPath("app", "k"), readerKey, "")
			if err != nil {
				return err
			}
			if a.slug() == "stale-read" {
				return fmt.Errorf("%v", a)
			}
			var got entryDoc
			if err := json.Unmarshal(a.body, &got); err != nil || got != want {
				t.Fatalf("round %d: the first plain read shows %v, want %+v", round, a, want)
			}
			return nil
		})
		if a, err := do("GET", late.url+keyPath("app", "missing"), readerKey, ""); err != nil || a.status != http.StatusNotFound {
			t.Errorf("round %d: caught up, it answers a read of a missing key with %v, %v", round, a, err)
		}
		c.ready()
	}
}

// leaderOf waits until one of some nodes says that it leads.
func (c *cluster) leaderOf(nodes []*node) (leader *node) {
	c.tb.Helper()
	until(c.tb, 15*time.Second, func() error {
		for _, n := range nodes {
			if code, st, err := n.status(); err == nil && code == http.StatusOK && st.Role == "leader" {
				leader = n
				return nil
			}
		}
		return errors.New("nobody leads")
	})
	return leader
}
