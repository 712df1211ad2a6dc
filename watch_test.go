package main

// Changes reach everyone who waits for them, once and in order, whatever happens to
// the node that tells them.

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// streaming has no time limit: a stream ends when somebody ends it.
var streaming = &http.Client{Transport: &http.Transport{DisableCompression: true, TLSClientConfig: transport.TLSClientConfig}}

// A frame is one event of a stream.
type frame struct{ id, event, data string }

// A stream is one connection to an event stream.
type stream struct {
	resp *http.Response
	r    *bufio.Reader
	stop context.CancelFunc
}

// openStream asks a node for events of ns, all if it is empty. query begins with "?" or is
// empty. What is no stream is an answer.
func openStream(n *node, ns, query string, headers ...string) (*stream, *answer, error) {
	path := "/api/v1/audit"
	if ns != "" {
		path += "/" + ns
	}
	ctx, stop := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, "GET", n.url+path+query, nil)
	if err != nil {
		stop()
		return nil, nil, err
	}
	req.Header.Set("X-API-Key", adminKey)
	req.Header.Set("Accept", "text/event-stream")
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := streaming.Do(req)
	if err != nil {
		stop()
		return nil, nil, err
	}
	if resp.StatusCode == http.StatusOK && resp.Header.Get("Content-Type") == "text/event-stream" {
		if err := documented("GET", path, &answer{resp.StatusCode, resp.Header, nil}); err != nil {
			stop()
			return nil, nil, err
		}
		return &stream{resp, bufio.NewReader(resp.Body), stop}, nil, nil
	}
	defer stop()
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	a := &answer{resp.StatusCode, resp.Header, text}
	return nil, a, errors.Join(err, documented("GET", path, a))
}

// close ends the connection.
func (s *stream) close() {
	s.stop()
	s.resp.Body.Close()
}

// next reads one event and passes comments over. A stream that ends is an error.
func (s *stream) next() (f frame, err error) {
	for {
		line, err := s.r.ReadString('\n')
		if err != nil {
			return f, err
		}
		line = line[:len(line)-1]
		name, value, ok := strings.Cut(line, ": ")
		switch {
		case line == "" && f.id != "":
			var e eventDoc
			if err := json.Unmarshal([]byte(f.data), &e); err != nil || e.ID != f.id || e.Action != f.event {
				return f, fmt.Errorf("%w: %+v is not one event (%v)", errGrammar, f, err)
			}
			return f, documentedEvent(f.data)
		case line == "", strings.HasPrefix(line, ":"):
		case ok && name == "id" && f == frame{}:
			f.id = value
		case ok && name == "event" && f.event == "" && f.id != "":
			f.event = value
		case ok && name == "data" && f.data == "" && f.event != "":
			f.data = value
		default:
			return f, fmt.Errorf("%w: line %q behind %+v", errGrammar, line, f)
		}
	}
}

// errGrammar says that a stream sends what is no event.
var errGrammar = errors.New("event stream")

// A listener follows the events of a namespace, or all, through whatever ends its streams.
type listener struct {
	ns    string
	nodes []*node
	rng   *rand.Rand

	resumed int
	wrong   error

	mu  sync.Mutex // protects ids
	ids []string
}

// count returns how many events have come, and the newest.
func (l *listener) count() (int, string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.ids) == 0 {
		return 0, ""
	}
	return len(l.ids), l.ids[len(l.ids)-1]
}

// follow listens until ctx ends. Each stream is of another node than the one before, and is
// given up after some events if it does not end before.
func (l *listener) follow(ctx context.Context) {
	at := l.rng.IntN(len(l.nodes))
	for l.wrong == nil {
		at = (at + 1 + l.rng.IntN(len(l.nodes)-1)) % len(l.nodes)
		headers, query := []string(nil), "?since=0"
		if count, last := l.count(); count > 0 {
			headers, query = []string{"Last-Event-ID", last}, ""
		}
		s, a, err := openStream(l.nodes[at], l.ns, query, headers...)
		if a != nil && a.status != http.StatusServiceUnavailable && (a.status != http.StatusNotFound || query == "") {
			l.wrong = fmt.Errorf("%s refuses a stream: %v", l.nodes[at].id, a)
			return
		}
		if s == nil {
			select {
			case <-ctx.Done():
				return
			case <-time.After(20 * time.Millisecond): // the pace of the question
			}
			continue
		}
		l.resumed++
		unhook := context.AfterFunc(ctx, s.close)
		for most := 200 + l.rng.IntN(2000); most > 0 && err == nil; most-- {
			var f frame
			if f, err = s.next(); errors.Is(err, errGrammar) {
				l.wrong = err
			} else if err == nil {
				l.mu.Lock()
				l.ids = append(l.ids, f.id)
				l.mu.Unlock()
			}
		}
		unhook()
		s.close()
		if ctx.Err() != nil {
			return
		}
	}
}

// TestStreams: a hundred clients at all nodes hear of every change once and in order, while
// leaders are killed and every client goes from node to node.
func TestStreams(t *testing.T) {
	t.Parallel()
	const listeners, writers = 100, 6
	changes := int64(rounds(1500, 5000))
	c := startCluster(t, 3)
	ctx, cancel := context.WithCancel(t.Context())
	var heard, wrote sync.WaitGroup
	var done atomic.Int64
	t.Cleanup(func() { // before the nodes go, however the test ends
		cancel()
		done.Store(changes)
		wrote.Wait()
		heard.Wait()
	})

	spaces := []string{"s0", "s1", "s2"}
	all := make([]*listener, listeners)
	for i := range all {
		l := &listener{nodes: c.nodes, rng: rand.New(rand.NewPCG(1, uint64(i)))}
		if i%4 > 0 {
			l.ns = spaces[i%4-1]
		}
		all[i] = l
		heard.Go(func() { l.follow(ctx) })
	}
	for w := range writers {
		rng := rand.New(rand.NewPCG(2, uint64(w)))
		wrote.Go(func() {
			for i := 0; done.Load() < changes; i++ {
				n, ns := c.nodes[rng.IntN(len(c.nodes))], spaces[rng.IntN(len(spaces))]
				method, path, body := "PUT", keyPath(ns, fmt.Sprintf("w%d/k%d", w, i%7)), fmt.Sprintf(`{"value":"%d"}`, i)
				switch rng.IntN(10) {
				case 0:
					method, body = "DELETE", ""
				case 1:
					method, path, body = "PATCH", "/api/v1/config/"+ns, fmt.Sprintf(`{"p%d":"%d","q%d":"%d","r%d":"%d"}`, w, i, w, i, w, i)
				}
				if a, err := doWith(following, method, n.url+path, adminKey, body); err == nil && a.status/100 == 2 {
					done.Add(1)
				}
			}
		})
	}
	written := func(n int64) {
		t.Helper()
		until(t, limit(60*time.Second), func() error {
			if got := done.Load(); got < n {
				return fmt.Errorf("%d changes are made, want %d", got, n)
			}
			return nil
		})
	}
	start := time.Now()
	for kill := range int64(2) {
		written((kill + 1) * changes / 3)
		old := c.leader()
		old.kill()
		c.leader()
		old.start()
		c.ready()
	}
	written(changes)
	wrote.Wait()
	c.converge()
	t.Logf("%d changes after %v", done.Load(), time.Since(start).Round(time.Millisecond))

	want := make(map[string][]string)
	for _, e := range c.nodes[0].trail(t, "") {
		want[""] = append(want[""], e.ID)
		want[e.Namespace] = append(want[e.Namespace], e.ID)
	}
	for _, l := range all {
		ids := want[l.ns]
		until(t, limit(20*time.Second), func() error {
			if count, last := l.count(); l.wrong == nil && last != ids[len(ids)-1] {
				return fmt.Errorf("a listener to %q has %d events, the last %s; want %d, %s", l.ns, count, last, len(ids), ids[len(ids)-1])
			}
			return nil
		})
	}
	t.Logf("all heard after %v", time.Since(start).Round(time.Millisecond))
	cancel()
	heard.Wait()
	missing, twice, wrongOrder, resumed := 0, 0, 0, 0
	for _, l := range all {
		if l.wrong != nil {
			t.Error(l.wrong)
		}
		m, w, o := countIDs(want[l.ns], l.ids)
		missing, twice, wrongOrder, resumed = missing+m, twice+w, wrongOrder+o, resumed+l.resumed
	}
	t.Logf("%d listeners, %d events in the trail, %d streams: %d missing, %d twice, %d out of order", listeners, len(want[""]), resumed, missing, twice, wrongOrder)
	if missing+twice+wrongOrder > 0 {
		t.Errorf("%d missing, %d twice, %d out of order", missing, twice, wrongOrder)
	}
	if resumed < 2*listeners {
		t.Errorf("%d streams for %d listeners: nobody resumed", resumed, listeners)
	}
}

// countIDs counts what is wrong with got.
func countIDs(want, got []string) (missing, twice, wrongOrder int) {
	place := make(map[string]int)
	for i, id := range want {
		place[id] = i + 1
	}
	seen, last := make(map[string]bool), 0
	for _, id := range got {
		switch at := place[id]; {
		case seen[id]:
			twice++
		case at < last || at == 0: // an event that the trail does not hold is out of any order
			wrongOrder++
		default:
			last = at
		}
		seen[id] = true
	}
	for _, id := range want {
		if !seen[id] {
			missing++
		}
	}
	return missing, twice, wrongOrder
}

// TestCountIDs: the count above counts.
func TestCountIDs(t *testing.T) {
	t.Parallel()
	for _, m := range []struct {
		got  string
		want [3]int
	}{
		{"1-0 1-1 2-0 3-0", [3]int{}},
		{"1-0 2-0 3-0", [3]int{1, 0, 0}},
		{"1-0 1-1 1-1 2-0 3-0", [3]int{0, 1, 0}},
		{"1-0 2-0 1-1 3-0", [3]int{0, 0, 1}},
		{"1-0 1-1 9-0 2-0 3-0", [3]int{0, 0, 1}},
	} {
		a, b, c := countIDs(strings.Fields("1-0 1-1 2-0 3-0"), strings.Fields(m.got))
		if got := [3]int{a, b, c}; got != m.want {
			t.Errorf("%s: missing, twice, out of order: %v, want %v", m.got, got, m.want)
		}
	}
}

// heads reads events until n have come and returns their ids and keys.
func heads(t *testing.T, s *stream, n int) (got []string) {
	t.Helper()
	timer := time.AfterFunc(limit(10*time.Second), s.close)
	defer timer.Stop()
	for range n {
		f, err := s.next()
		if err != nil {
			t.Fatalf("behind %q: %v", got, err)
		}
		var e eventDoc
		if err := json.Unmarshal([]byte(f.data), &e); err != nil {
			t.Fatal(err)
		}
		got = append(got, f.event+" "+e.Namespace+"/"+e.Key)
	}
	return got
}

// TestStreamForms: what a stream begins with, what it leaves out, and what is refused.
func TestStreamForms(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, calm)
	leader := c.leader()
	var revs []uint64
	for _, key := range strings.Fields("a/1 b/1 a/2 a/1 b/2") {
		ns, name, _ := strings.Cut(key, "/")
		revs = append(revs, leader.put(t, ns, name, key+fmt.Sprint(len(revs))).Revision)
	}
	leader.delete(t, "a", "2")
	leader.ask(t, "PATCH", "/api/v1/config/a", `{"x":"1","y":"2","z":"3"}`) // one revision, three events
	st := c.converge()
	id := func(rev uint64, i int) []string { return []string{"Last-Event-ID", fmt.Sprintf("%d-%d", rev, i)} }
	every := []string{"config.set a/1", "config.set b/1", "config.set a/2", "config.set a/1", "config.set b/2", "config.delete a/2",
		"config.set a/x", "config.set a/y", "config.set a/z"}
	onlyA := []string{every[0], every[2], every[3], every[5], every[6], every[7], every[8]}
	for _, m := range []struct {
		name, ns, query string
		headers         []string
		want            []string
	}{
		{"all from the beginning", "", "?since=0", nil, every},
		{"one namespace from the beginning", "a", "?since=0", nil, onlyA},
		{"since a revision", "a", fmt.Sprintf("?since=%d", revs[2]), nil, onlyA[2:]},
		{"since another's revision", "a", fmt.Sprintf("?since=%d", revs[1]), nil, onlyA[1:]},
		{"behind an event", "", "", id(revs[3], 0), every[4:]},
		{"behind another's event", "a", "", id(revs[4], 0), onlyA[3:]},
		{"inside a revision", "a", "", id(st.Revision, 1), onlyA[6:]},
		{"an id before since", "", fmt.Sprintf("?since=%d", revs[0]), id(revs[3], 0), every[4:]},
		{"a key", "a", "?since=0&key=1", nil, []string{every[0], every[3]}},
		{"an actor", "a", "?since=0&actor=ops@test", nil, onlyA},
		{"stale", "a", "?since=0&stale", nil, onlyA},
		{"consistent", "a", "?since=0&consistent", nil, onlyA},
	} {
		for _, n := range c.nodes {
			s, a, err := openStream(n, m.ns, m.query, m.headers...)
			if err != nil || s == nil {
				t.Fatalf("%s at %s: %v, %v", m.name, n.id, a, err)
			}
			h := s.resp.Header
			if h.Get("Cache-Control") != "no-store" || h.Get("Confman-Revision") == "" || h.Get("Confman-Staleness-Ms") == "" {
				t.Errorf("%s at %s: %v", m.name, n.id, h)
			}
			if got := heads(t, s, len(m.want)); fmt.Sprint(got) != fmt.Sprint(m.want) {
				t.Errorf("%s at %s: %q, want %q", m.name, n.id, got, m.want)
			}
			s.close()
		}
	}

	// From now: the first event is the one that this makes, also behind a filter.
	for _, n := range c.nodes {
		for _, query := range []string{"", "?key=mine", "?correlationId=mine"} {
			s, a, err := openStream(n, "a", query, "Confman-Min-Revision", fmt.Sprint(c.converge().Revision))
			if err != nil || s == nil {
				t.Fatalf("from now at %s: %v, %v", n.id, a, err)
			}
			if query != "" {
				leader.put(t, "a", "other", n.id+query)
			}
			leader.put(t, "b", "mine", n.id+query)
			leader.ask(t, "PUT", keyPath("a", "mine"), `{"value":"`+n.id+query+`"}`, "X-Correlation-Id", "mine")
			if got := heads(t, s, 1)[0]; got != "config.set a/mine" {
				t.Errorf("from now %q at %s: %q", query, n.id, got)
			}
			s.close()
		}
	}

	rev := c.converge().Revision
	for _, m := range []struct {
		name, ns, query string
		headers         []string
		status          int
		slug            string
	}{
		{"an id beyond", "", "", id(rev+1, 0), 410, "gone"},
		{"an id far beyond", "a", "", id(rev+1_000_000, 3), 410, "gone"},
		{"since beyond", "a", fmt.Sprintf("?since=%d", rev+1), nil, 410, "gone"},
		{"no id", "a", "", []string{"Last-Event-ID", "x"}, 400, "bad-request"},
		{"half an id", "a", "", []string{"Last-Event-ID", "42"}, 400, "bad-request"},
		{"an id with a sign", "a", "", []string{"Last-Event-ID", "+4-0"}, 400, "bad-request"},
		{"an id and more", "a", "", []string{"Last-Event-ID", "4-0-0"}, 400, "bad-request"},
		{"a negative index", "a", "", []string{"Last-Event-ID", "4--1"}, 400, "bad-request"},
		{"a malformed since", "a", "?since=x", nil, 400, "bad-request"},
		{"a limit", "a", "?limit=3", nil, 400, "bad-request"},
		{"an unknown parameter", "a", "?sinse=3", nil, 400, "bad-request"},
		{"a namespace that never was", "never", "?since=0", nil, 404, "not-found"},
		{"no key", "a", "", []string{"X-API-Key", ""}, 401, "unauthorized"},
		{"all, by a reader", "", "?since=0", []string{"X-API-Key", readerKey}, 403, "forbidden"},
	} {
		for _, n := range c.nodes {
			s, a, err := openStream(n, m.ns, m.query, m.headers...)
			if s != nil {
				s.close()
			}
			if err != nil || s != nil || a.status != m.status || a.slug() != m.slug {
				t.Errorf("%s at %s: %v (%v), want %d %s", m.name, n.id, a, err, m.status, m.slug)
			}
		}
	}

	// A client that does not ask for a stream gets the list.
	for _, accept := range []string{"", "*/*", "application/json", "application/json, text/event-stream", "text/event-stream;q=0"} {
		a := leader.ask(t, "GET", "/api/v1/audit/a?since=0", "", "Accept", accept)
		if a.status != http.StatusOK || a.header.Get("Content-Type") != "application/json" {
			t.Errorf("Accept %q: %v, %v", accept, a, a.header)
		}
	}

	// Through a restart, from the same node; and a clean stop ends streams and waits, so that
	// their clients go elsewhere.
	f := c.followers()[0]
	s, a, err := openStream(f, "a", "")
	if err != nil || s == nil {
		t.Fatalf("%v, %v", a, err)
	}
	leader.put(t, "a", "before", "restart")
	if got := heads(t, s, 1)[0]; got != "config.set a/before" {
		t.Errorf("before the restart: %q", got)
	}
	last := fmt.Sprintf("%d-0", leader.get(t, "a", "before").Revision)
	wait := newPending(t, f)
	etag := f.ask(t, "GET", keyPath("a", "before"), "").header.Get("ETag")
	if err := wait.send("GET", keyPath("a", "before")+"?wait=1m", "", "If-None-Match", etag); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	f.signal(syscall.SIGTERM)
	if f, err := s.next(); err == nil || errors.Is(err, errGrammar) {
		t.Errorf("a stream at the end of its node: %+v, %v", f, err)
	}
	if a, err := wait.answer(); err != nil || a.status != http.StatusNotModified {
		t.Errorf("a wait at the end of its node: %v, %v", a, err)
	}
	f.ended()
	t.Logf("streams and waits ended and so did the node, after %v", time.Since(start).Round(time.Millisecond))
	leader.put(t, "a", "while", "it is down")
	f.start()
	c.ready()
	if s, a, err = openStream(f, "a", "", "Last-Event-ID", last); err != nil || s == nil {
		t.Fatalf("%v, %v", a, err)
	}
	defer s.close()
	leader.put(t, "a", "after", "restart")
	if got := heads(t, s, 2); fmt.Sprint(got) != "[config.set a/while config.set a/after]" {
		t.Errorf("behind %s after the restart: %q", last, got)
	}
}
