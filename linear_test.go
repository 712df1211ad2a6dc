package main

// A recorded history of what clients did to a few keys, while leaders were killed and
// paused under them, is held against what one register per key could have answered.

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// A deed is one operation of a client on a key: the input of a step.
type deed struct {
	kind  byte // 'g'et, 'p'ut, 'u'pdate (if-match), 'c'reate (if-none-match: *) or 'd'elete
	key   string
	id    string // correlation id, and the value of a write: no two are alike
	match uint64 // of an update: the revision that it wants to find
}

// A finding is what the answer said: the output of a step.
type finding struct {
	status int
	value  string
	rev    uint64 // of the entry that was read or made; of a 412, of what is there, 0 for nothing
}

// A register is the state of one key; the zero register is a key that is not there.
type register struct {
	value string
	rev   uint64
}

// register's model: what a single copy of the data, asked by one client at a time,
// could answer.
var registerModel = porcupine.Model{
	Partition: func(history []porcupine.Operation) (parts [][]porcupine.Operation) {
		byKey := make(map[string]int)
		for _, op := range history {
			key := op.Input.(deed).key
			i, ok := byKey[key]
			if !ok {
				i = len(parts)
				byKey[key] = i
				parts = append(parts, nil)
			}
			parts[i] = append(parts[i], op)
		}
		return parts
	},
	Init: func() any { return register{} },
	Step: func(state, input, output any) (bool, any) {
		r, d, f := state.(register), input.(deed), output.(finding)
		made := register{d.id, f.rev}
		switch f.status {
		case http.StatusNotFound: // of a get or a delete
			return r == register{}, r
		case http.StatusPreconditionFailed:
			return f.rev == r.rev && (d.kind == 'c' && r.rev != 0 || d.kind == 'u' && r.rev != d.match), r
		case http.StatusNoContent:
			return r.rev != 0, register{}
		}
		switch d.kind {
		case 'g':
			return r == register{f.value, f.rev}, r
		case 'u':
			return r.rev == d.match && f.rev > r.rev, made
		case 'c':
			return r.rev == 0 && f.status == http.StatusCreated, made
		}
		return f.rev > r.rev && (f.status == http.StatusCreated) == (r.rev == 0), made
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v -> %+v", input, output) },
}

// TestRegisterModel: the model refuses what it is there to refuse.
func TestRegisterModel(t *testing.T) {
	t.Parallel()
	type step struct {
		from, to int64
		d        deed
		f        finding
	}
	put := func(from, to int64, id string, status int, rev uint64) step {
		return step{from, to, deed{kind: 'p', id: id}, finding{status: status, rev: rev}}
	}
	get := func(from, to int64, value string, rev uint64) step {
		return step{from, to, deed{kind: 'g'}, finding{200, value, rev}}
	}
	missing := func(from, to int64) step { return step{from, to, deed{kind: 'g'}, finding{status: 404}} }
	update := func(from, to int64, match uint64, status int, rev uint64) step {
		return step{from, to, deed{kind: 'u', id: "u", match: match}, finding{status: status, rev: rev}}
	}
	for _, m := range []struct {
		name  string
		steps []step
		want  bool
	}{
		{"read of what was written", []step{put(1, 2, "a", 201, 1), get(3, 4, "a", 1)}, true},
		{"stale read", []step{put(1, 2, "a", 201, 1), put(3, 4, "b", 200, 2), get(5, 6, "a", 1)}, false},
		{"read beside a write", []step{put(1, 2, "a", 201, 1), put(3, 6, "b", 200, 2), get(4, 5, "a", 1), get(4, 5, "b", 2)}, true},
		{"back in time", []step{put(1, 2, "a", 201, 1), put(3, 9, "b", 200, 2), get(4, 5, "b", 2), get(6, 7, "a", 1)}, false},
		{"not there any more", []step{put(1, 2, "a", 201, 1), missing(3, 4)}, false},
		{"lost write", []step{put(1, 2, "a", 201, 1), put(3, 4, "b", 201, 2)}, false},
		{"unknown write, late", []step{put(1, 2, "a", 201, 1), put(3, math.MaxInt64, "b", 200, 2), get(5, 6, "a", 1), get(7, 8, "b", 2)}, true},
		{"update of what is there", []step{put(1, 2, "a", 201, 1), update(3, 4, 1, 200, 2), get(5, 6, "u", 2)}, true},
		{"update of what is not there", []step{put(1, 2, "a", 201, 1), put(3, 4, "b", 200, 2), update(5, 6, 1, 200, 3)}, false},
		{"refused without reason", []step{put(1, 2, "a", 201, 1), update(3, 4, 1, 412, 1)}, false},
	} {
		var history []porcupine.Operation
		for _, s := range m.steps {
			history = append(history, porcupine.Operation{Input: s.d, Call: s.from, Output: s.f, Return: s.to})
		}
		if got := porcupine.CheckOperations(registerModel, history); got != m.want {
			t.Errorf("%s: linearizable is %t, want %t", m.name, got, m.want)
		}
	}
}

// A recording is a history in the making.
type recording struct {
	c     *cluster
	epoch time.Time
	quit  chan struct{}
	wg    sync.WaitGroup

	paused atomic.Pointer[node] // the node that is paused now, if any
	done   atomic.Int64         // operations with a known outcome

	mu       sync.Mutex // protects the rest
	history  []porcupine.Operation
	unknown  []porcupine.Operation // writes without an answer that says
	refused  map[string]bool       // by id: writes that were not applied, says the answer
	late     int                   // operations sent to a node while it was paused
	heard    int                   // those of them that were answered
	settleIn time.Time             // when the newest unknown write can be settled
	wrong    []string              // answers that the contract does not know
}

// recordTimeout is how long a client waits: longer than most pauses, so that answers to what
// was sent during one are heard too.
const recordTimeout = 3 * time.Second

// recordRequestTimeout is the RequestTimeout of the cluster.
const recordRequestTimeout = time.Second

// newRecorder makes one client's HTTP client. It follows no redirect by itself.
func newRecorder() *http.Client {
	return &http.Client{
		Transport:     &http.Transport{MaxIdleConnsPerHost: 2, DisableCompression: true},
		Timeout:       recordTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// draw makes something to do.
func draw(rng *rand.Rand, id string) deed {
	return deed{kind: "ggggggggppppuuucd"[rng.IntN(17)], key: "k" + strconv.Itoa(rng.IntN(4)), id: id}
}

// work is one client: it draws what to do, and where, until the recording ends.
func (r *recording) work(client int, rng *rand.Rand) {
	hc := newRecorder()
	defer hc.CloseIdleConnections()
	seen := make(map[string]uint64) // by key: the newest revision that this client knows
	for i := 0; ; i++ {
		select {
		case <-r.quit:
			return
		case <-time.After(time.Duration(rng.IntN(3)) * time.Millisecond): // a pace that the check can follow
		}
		d := draw(rng, fmt.Sprintf("c%d-%d", client, i))
		if d.match = seen[d.key]; d.kind == 'u' && d.match == 0 {
			d.kind = 'c'
		}
		n := r.c.nodes[rng.IntN(len(r.c.nodes))]
		// Three clients go to a paused node too; were it all, nobody would work meanwhile.
		if r.paused.Load() == n && client >= 3 {
			continue
		}
		if f, known := r.act(hc, client, n, d); known {
			seen[d.key] = f.rev // 0 if it is not there
		}
	}
}

// visit sends requests to a paused node, each a client of its own, and returns when they
// are in its sockets. They are answered, or not, when it goes on.
func (r *recording) visit(n *node, round int, rng *rand.Rand) {
	const visitors = 8
	var wrote atomic.Int64
	for i := range visitors {
		d := draw(rng, fmt.Sprintf("v%d-%d", round, i))
		if i%2 == 0 {
			d.kind = 'g'
		} else if d.kind == 'u' {
			d.kind = 'c' // it has seen nothing to update
		}
		hc := newRecorder()
		r.wg.Go(func() {
			defer hc.CloseIdleConnections()
			r.act(&http.Client{Transport: tracing{hc.Transport, &wrote}, Timeout: hc.Timeout, CheckRedirect: hc.CheckRedirect},
				100*(round+1)+i, n, d)
		})
	}
	until(r.c.tb, limit(5*time.Second), func() error {
		if got := wrote.Load(); got < visitors {
			return fmt.Errorf("%d of %d requests are sent to %s", got, visitors, n.id)
		}
		return nil
	})
}

// tracing counts requests that are written.
type tracing struct {
	http.RoundTripper
	wrote *atomic.Int64
}

func (t tracing) RoundTrip(req *http.Request) (*http.Response, error) {
	trace := &httptrace.ClientTrace{WroteRequest: func(httptrace.WroteRequestInfo) { t.wrote.Add(1) }}
	return t.RoundTripper.RoundTrip(req.WithContext(httptrace.WithClientTrace(req.Context(), trace)))
}

// act does one deed at n and notes it; known says that its outcome is.
func (r *recording) act(hc *http.Client, client int, n *node, d deed) (f finding, known bool) {
	late := r.paused.Load() == n
	from := time.Since(r.epoch)
	a, err := r.send(hc, n, d)
	op := porcupine.Operation{ClientId: client, Input: d, Call: int64(from), Return: int64(time.Since(r.epoch))}
	r.mu.Lock()
	defer r.mu.Unlock()
	if f, known = r.take(op, a, err); known {
		r.done.Add(1)
	}
	if late {
		r.late++
		if a != nil {
			r.heard++
		}
	}
	return f, known
}

// errRefused says that a write was not applied.
var errRefused = errors.New("not applied")

// send does a deed at n, or where n says that the leader is.
func (r *recording) send(hc *http.Client, n *node, d deed) (*answer, error) {
	path := keyPath("lin", d.key)
	if d.kind == 'g' {
		return doWith(hc, "GET", n.url+path+"?consistent", readerKey, "")
	}
	method, body, headers := "PUT", `{"value":"`+d.id+`"}`, []string{"X-Correlation-Id", d.id}
	switch d.kind {
	case 'd':
		method, body = "DELETE", ""
	case 'c':
		headers = append(headers, "If-None-Match", "*")
	case 'u':
		headers = append(headers, "If-Match", fmt.Sprintf(`"%d"`, d.match))
	}
	base := n.url
	for range 3 {
		a, err := doWith(hc, method, base+path, adminKey, body, headers...)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil, errRefused
		}
		if err != nil || a.status != http.StatusTemporaryRedirect {
			return a, err
		}
		to, ok := strings.CutSuffix(a.header.Get("Location"), path)
		if !ok {
			return a, nil
		}
		base = to
	}
	return nil, errRefused // each has sent us on to another
}

// take notes an operation; known says that its outcome is. r.mu is held.
func (r *recording) take(op porcupine.Operation, a *answer, err error) (f finding, known bool) {
	d := op.Input.(deed)
	var doc struct {
		Value    string
		Revision uint64
		Outcome  string
		Current  *struct{ Revision uint64 }
	}
	if err == nil && len(a.body) > 0 {
		json.Unmarshal(a.body, &doc) // an answer that is not JSON has no members and is wrong
	}
	switch {
	case d.kind == 'g' && (err != nil || a.status == http.StatusServiceUnavailable):
		return f, false // a read without an answer says nothing
	case err == errRefused, err == nil && a.status == http.StatusServiceUnavailable && doc.Outcome == "not-applied":
		r.refused[d.id] = true
		return f, false
	case err != nil, a.status == http.StatusGatewayTimeout && doc.Outcome == "unknown" && d.kind != 'g':
		r.unknown = append(r.unknown, op)
		r.settleIn = time.Now().Add(recordRequestTimeout)
		return f, false
	case a.status == http.StatusOK && doc.Revision > 0 && d.kind != 'd',
		a.status == http.StatusCreated && doc.Revision > 0 && strings.ContainsRune("pc", rune(d.kind)),
		a.status == http.StatusNoContent && d.kind == 'd',
		a.status == http.StatusNotFound && strings.ContainsRune("gd", rune(d.kind)):
		f = finding{a.status, doc.Value, doc.Revision}
	case a.status == http.StatusPreconditionFailed && strings.ContainsRune("uc", rune(d.kind)):
		f.status = a.status
		if doc.Current != nil {
			f.rev = doc.Current.Revision
		}
	default:
		r.wrong = append(r.wrong, fmt.Sprintf("%+v: %v", d, a))
		return f, false
	}
	op.Output = f
	r.history = append(r.history, op)
	return f, true
}

// more waits until n more operations have an answer.
func (r *recording) more(n int64) {
	r.c.tb.Helper()
	want := r.done.Load() + n
	until(r.c.tb, limit(15*time.Second), func() error {
		if got := r.done.Load(); got < want {
			return fmt.Errorf("%d operations are done, want %d", got, want)
		}
		return nil
	})
}

// settle asks the trail what became of the writes of unknown outcome, as a client would,
// at any node. Those that it holds took effect at some time after they were sent, with no
// end; what it does not hold is taken out. It returns how many it holds.
func (r *recording) settle(rng *rand.Rand) (present map[string]bool) {
	tb := r.c.tb
	tb.Helper()
	time.Sleep(time.Until(r.settleIn)) // the contract's RequestTimeout, not a guess
	present = make(map[string]bool)
	for _, op := range r.unknown {
		d := op.Input.(deed)
		n := r.c.nodes[rng.IntN(len(r.c.nodes))]
		var events []eventDoc
		for _, raw := range n.items(tb, "/api/v1/audit/lin", url.Values{"consistent": {""}, "correlationId": {d.id}}) {
			var e eventDoc
			if err := json.Unmarshal(raw, &e); err != nil {
				tb.Fatal(err)
			}
			events = append(events, e)
		}
		if len(events) == 0 {
			continue
		}
		present[d.id] = true
		e := events[0]
		f := finding{status: http.StatusOK, rev: e.Revision}
		switch {
		case e.Action == "config.delete":
			f = finding{status: http.StatusNoContent}
		case e.Version == 1:
			f.status = http.StatusCreated
		}
		op.Output, op.Return = f, math.MaxInt64
		r.history = append(r.history, op)
	}
	return present
}

// checkTrail compares what the clients were told with the trail, at the very end.
func (r *recording) checkTrail(present map[string]bool) {
	tb := r.c.tb
	tb.Helper()
	r.c.converge()
	seen := make(map[string]uint64)
	for _, e := range r.c.nodes[0].trail(tb, "lin") {
		if seen[e.CorrelationID] != 0 {
			tb.Errorf("%s is in the trail twice", e.CorrelationID)
		}
		seen[e.CorrelationID] = e.Revision
		if r.refused[e.CorrelationID] {
			tb.Errorf("%s was refused and is in the trail: %s", e.CorrelationID, e.raw)
		}
	}
	for _, op := range r.unknown {
		if id := op.Input.(deed).id; (seen[id] != 0) != present[id] {
			tb.Errorf("%s was settled as present: %t, and is at revision %d of the trail now", id, present[id], seen[id])
		}
	}
	for _, op := range r.history {
		d, f := op.Input.(deed), op.Output.(finding)
		if d.kind == 'g' || f.status == http.StatusNotFound || f.status == http.StatusPreconditionFailed {
			continue
		}
		if got := seen[d.id]; got == 0 || f.rev != 0 && got != f.rev {
			tb.Errorf("%+v was answered with %+v and is at revision %d of the trail", d, f, got)
		}
	}
}

// TestLinearizable: consistent reads and writes at all nodes, while leaders are killed and
// paused, could all have been answered by a single copy.
func TestLinearizable(t *testing.T) {
	t.Parallel()
	seeds := []uint64{rand.Uint64N(1_000_000)}
	if s, err := strconv.ParseUint(os.Getenv("CONFMAN_SEED"), 10, 64); err == nil {
		seeds[0] = s
	}
	for i := range uint64(rounds(1, 10) - 1) {
		seeds = append(seeds, seeds[0]+1+i)
	}
	for _, seed := range seeds {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { linearize(t, seed) })
	}
}

// linearize is TestLinearizable with one seed. The seed decides what clients do and
// which fault follows which; when, the machine decides.
func linearize(t *testing.T, seed uint64) {
	const clients = 8
	c := startCluster(t, 3, with("Cluster", "RequestTimeout", recordRequestTimeout.Milliseconds()))
	r := &recording{c: c, epoch: time.Now(), quit: make(chan struct{}), refused: make(map[string]bool)}
	stop := sync.OnceFunc(func() {
		close(r.quit)
		r.wg.Wait()
	})
	t.Cleanup(stop) // before the nodes go, if the test has not done it
	for client := range clients {
		r.wg.Go(func() { r.work(client, rand.New(rand.NewPCG(seed, uint64(client)))) })
	}
	rng := rand.New(rand.NewPCG(seed, clients))

	r.more(100) // until every client has its connections
	start := time.Now()
	r.more(200)
	if rate := 200 / time.Since(start).Seconds(); rate < 50 {
		t.Fatalf("%.0f operations/s before the first fault: too few for a run to mean something", rate)
	}
	faults := []string{"pause", "kill", "pause", "kill", "pause"}
	rng.Shuffle(len(faults), func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })
	for round, fault := range faults {
		r.more(100)
		old := c.leader()
		if fault == "kill" {
			old.kill()
			r.more(int64(50 + rng.IntN(150)))
			old.start()
		} else {
			old.pause()
			r.paused.Store(old)
			c.leader() // among the others
			r.more(int64(50 + rng.IntN(300)))
			r.visit(old, round, rng)
			old.resume()
			r.paused.Store(nil)
		}
		c.ready()
	}
	r.more(200)
	stop()

	present := r.settle(rng)
	r.checkTrail(present)
	for _, w := range r.wrong {
		t.Errorf("unexpected answer: %s", w)
	}
	reads := 0
	for _, op := range r.history {
		if op.Input.(deed).kind == 'g' {
			reads++
		}
	}
	t.Logf("%d operations in %v, %d of them reads; %d sent to a paused node, %d of them with an answer; %d of unknown outcome, of which %d took effect; %d refused",
		len(r.history), time.Since(start).Round(time.Millisecond), reads, r.late, r.heard, len(r.unknown), len(present), len(r.refused))
	if r.heard == 0 {
		t.Errorf("nothing of the %d operations sent to a paused node was answered", r.late)
	}
	slices.SortFunc(r.history, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
	switch porcupine.CheckOperationsTimeout(registerModel, r.history, time.Minute) {
	case porcupine.Illegal:
		t.Errorf("the history of seed %d is not linearizable", seed)
		r.show()
	case porcupine.Unknown:
		t.Errorf("the history of seed %d cannot be checked within a minute", seed)
	}
}

// show writes the history as a page to look at, if CONFMAN_LOGS says where.
func (r *recording) show() {
	dir := os.Getenv("CONFMAN_LOGS")
	if dir == "" {
		return
	}
	_, info := porcupine.CheckOperationsVerbose(registerModel, r.history, time.Minute)
	f, err := os.CreateTemp(dir, "history-*.html")
	if err == nil {
		err = errors.Join(porcupine.Visualize(registerModel, info, f), f.Close())
	}
	r.c.tb.Logf("history drawn in %s: %v", dir, err)
}
