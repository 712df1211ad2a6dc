package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"math"
	"net/http"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-metrics"
	sink "github.com/hashicorp/go-metrics/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"go.etcd.io/bbolt"
)

// Who does a thing counts it, in fields of his own that cost him next to nothing; a scrape reads
// them. What is told apart by a label is one of a list that the program knows, or a node.

// bounds are the upper ends of a histogram's buckets: a read takes a tenth of a millisecond, a write that
// many disks wait for some, and at RequestTimeout a request is over.
var bounds = [...]time.Duration{
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

// A histogram counts how often something took how long. The zero value has counted nothing.
type histogram struct {
	counts [len(bounds) + 1]atomic.Uint64 // by the first of bounds that is not less, and none
	nanos  atomic.Int64                   // all together
}

func (h *histogram) observe(took time.Duration) {
	i := 0
	for i < len(bounds) && took > bounds[i] {
		i++
	}
	h.counts[i].Add(1)
	h.nanos.Add(int64(took))
}

// A tally counts the answers of one route.
type tally struct {
	method, route string             // "none" for what is no route
	statuses      [600]atomic.Uint64 // answers by status
	took          histogram          // of those that did not take as long as they were asked to
}

// newTallies makes a tally for each route and, under nil, for what is none.
func newTallies(routes []*route) map[*route]*tally {
	all := map[*route]*tally{nil: {method: "none", route: "none"}}
	for _, rt := range routes {
		all[rt] = &tally{method: rt.method, route: rt.pattern}
	}
	return all
}

// count counts the answer to a call.
func (s *server) count(c *call, status int, took time.Duration, err error) {
	t := s.tallies[c.route]
	t.statuses[min(status, len(t.statuses)-1)].Add(1)
	if !c.waited {
		t.took.observe(took)
	}
	if err != nil && c.writes() && problemOf(err).kind.outcome == "unknown" {
		s.unknown.Add(1)
	}
}

// A census is how many keys and namespaces the store has, and at which revision they were counted.
type census struct {
	mu               sync.Mutex // guards the rest
	done             bool
	rev              uint64
	keys, namespaces uint64
}

// take counts anew if anything has changed. It reads the records of namespaces, not of keys.
func (n *census) take(s *store) (keys, namespaces uint64, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	err = s.view(func(tx *bbolt.Tx) error {
		rev := storedRevision(tx)
		if n.done && n.rev == rev {
			return nil
		}
		var keys, namespaces uint64
		err := tx.Bucket(bucketNamespaces).ForEach(func(k, rec []byte) error {
			b, err := unseal(bucketNamespaces, k, rec)
			if err == nil && b[0]&1 == 0 {
				namespaces++
				keys += binary.BigEndian.Uint64(b[1:])
			}
			return err
		})
		if err == nil {
			n.done, n.rev, n.keys, n.namespaces = true, rev, keys, namespaces
		}
		return err
	})
	return n.keys, n.namespaces, err
}

// lagTime bounds how long a scrape waits for the other nodes.
const lagTime = 250 * time.Millisecond

// lags returns for each other node how many committed entries of the log it has not applied, as far as
// this node, which must lead, has heard: of one that says nothing, by what it said last. It is nil
// where this node does not lead.
func (n *raftNode) lags(ctx context.Context) map[string]uint64 {
	if !n.leads() {
		return nil
	}
	r := n.raft.Load()
	committed := r.CommitIndex()
	ctx, cancel := context.WithTimeout(ctx, lagTime)
	defer cancel()
	var asked sync.WaitGroup
	lags := map[string]uint64{}
	for _, m := range n.servers() {
		id := string(m.ID)
		if id == n.id {
			continue
		}
		lags[id] = 0
		asked.Go(func() {
			if nums, err := n.ask(ctx, id, "/applied", 1); err == nil {
				n.heard.Store(id, nums[0])
			}
		})
	}
	asked.Wait()
	for id := range lags {
		applied, _ := n.heard.Load(id)
		at, _ := applied.(uint64)
		lags[id] = committed - min(at, committed)
	}
	return lags
}

// A scrape is the metrics of this moment. It is a prometheus.Collector.
type scrape []prometheus.Metric

// Describe implements prometheus.Collector: what is collected is checked, but is not known before.
func (s scrape) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (s scrape) Collect(to chan<- prometheus.Metric) {
	for _, m := range s {
		to <- m
	}
}

// desc is a metric's name and help; labels are names and values in turn.
func desc(name, help string, labels []string) *prometheus.Desc {
	of := prometheus.Labels{}
	for i := 0; i < len(labels); i += 2 {
		of[labels[i]] = labels[i+1]
	}
	return prometheus.NewDesc("confman_"+name, help, nil, of)
}

func (s *scrape) gauge(name, help string, v float64, labels ...string) {
	*s = append(*s, prometheus.MustNewConstMetric(desc(name, help, labels), prometheus.GaugeValue, v))
}

func (s *scrape) counter(name, help string, v uint64, labels ...string) {
	*s = append(*s, prometheus.MustNewConstMetric(desc(name, help, labels), prometheus.CounterValue, float64(v)))
}

func (s *scrape) histogram(name, help string, h *histogram, labels ...string) {
	buckets, count := map[float64]uint64{}, uint64(0)
	for i := range h.counts {
		if count += h.counts[i].Load(); i < len(bounds) {
			buckets[bounds[i].Seconds()] = count
		}
	}
	*s = append(*s, prometheus.MustNewConstHistogram(desc(name, help, labels), count, time.Duration(h.nanos.Load()).Seconds(), buckets))
}

// scrape reads everything that is counted. README.md says what each metric is for.
func (s *server) scrape(ctx context.Context) (scrape, error) {
	var m scrape
	n := s.node
	keys, namespaces, err := s.census.take(s.store)
	if err != nil {
		return nil, err
	}
	flag := func(yes bool) float64 {
		if yes {
			return 1
		}
		return 0
	}
	m.gauge("build_info", "Which program this is; always 1.", 1, "version", version(), "goversion", runtime.Version())

	for _, t := range s.tallies {
		asked := false
		for status := range t.statuses {
			if count := t.statuses[status].Load(); count > 0 {
				asked = true
				m.counter("requests_total", "Requests answered, by route and status.", count,
					"method", t.method, "route", t.route, "status", strconv.Itoa(status))
			}
		}
		if asked {
			m.histogram("request_seconds", "Time from a request's head to the end of its answer, of those that were not asked to wait or to stream.",
				&t.took, "method", t.method, "route", t.route)
		}
	}
	for reason, count := range map[string]*atomic.Uint64{
		"unauthorized": &s.refusals.unauthorized, "forbidden": &s.refusals.forbidden, "too_many_requests": &s.refusals.tooMany,
	} {
		m.counter("refusals_total", "Requests refused with 401, 403 and 429.", count.Load(), "reason", reason)
	}
	m.counter("unknown_outcomes_total", "Writes that this node answered with an unknown outcome.", s.unknown.Load())
	s.crowd.mu.Lock()
	streams, waits := s.crowd.streams, s.crowd.all-s.crowd.streams
	s.crowd.mu.Unlock()
	m.gauge("streams", "Event streams that are open.", float64(streams))
	m.gauge("waits", "Requests with ?wait that are open.", float64(waits))
	if s.door != nil {
		m.gauge("connections", "Connections of clients that are open.", float64(len(s.door.room)))
	}

	ready := s.readiness()
	m.gauge("ready", "Whether /health/ready says 200.", flag(ready.Reason == ""))
	m.gauge("revision", "The revision that this node has applied.", float64(ready.Revision))
	m.gauge("term", "Raft's term.", float64(ready.Term))
	for _, role := range []string{"leader", "follower", "candidate", "nonvoter"} {
		m.gauge("role", "The node's role: 1 for the one that it has.", flag(ready.Role == role), "role", role)
	}
	m.counter("leader_changes_total", "Leaders that this node has seen begin.", n.leaders.Load())
	staleness := math.NaN()
	if ready.StalenessMs >= 0 {
		staleness = float64(ready.StalenessMs) / 1000
	}
	m.gauge("staleness_seconds", "How old a plain read of this node can be; NaN where it cannot say.", staleness)
	for id, lag := range n.lags(ctx) {
		m.gauge("follower_lag_entries", "On the leader: committed entries of the log that a node has not applied.", float64(lag), "peer", id)
	}
	m.histogram("commit_seconds", "Time from a command's proposal here until it was committed and applied.", &n.committed)
	m.histogram("apply_seconds", "Time of a transaction that applies entries of the log.", &s.store.applying)
	m.gauge("keys", "Keys in the store.", float64(keys))
	m.gauge("namespaces", "Namespaces in the store.", float64(namespaces))

	if n.disk != nil {
		free := math.NaN()
		if f := n.disk.free.Load(); f != allFree {
			free = float64(f)
		}
		m.gauge("disk_free_bytes", "Bytes free on the disk of the data directory.", free)
		m.gauge("disk_needed_bytes", "Bytes that must be free for a leader to take writes.", float64(n.disk.leaderFloor()))
		m.gauge("file_bytes", "Size of a file or directory of data.", float64(n.disk.state.Load()), "file", "state.db")
		m.gauge("file_bytes", "Size of a file or directory of data.", float64(n.disk.raft.Load()), "file", "raft.db")
		m.gauge("file_bytes", "Size of a file or directory of data.", float64(n.disk.snapshots.Load()), "file", "snapshots")
		m.histogram("log_append_seconds", "Time of an append to raft's log, with its fsync.", &n.logs.appending)
		m.counter("snapshots_total", "Snapshots that this node has taken.", n.snapshots.taken.Load())
		m.counter("snapshot_failures_total", "Snapshots that were due and were not taken; one a second while the disk has no room.", n.snapshots.failed.Load())
		m.gauge("snapshot_last_timestamp_seconds", "When the newest snapshot was written, taken here or received; 0 without one.",
			float64(n.disk.taken.Load())/1e9)
		m.gauge("snapshot_last_bytes", "Size of the newest snapshot.", float64(n.disk.newest.Load()))
	}
	return m, nil
}

// process are the metrics of Go's runtime and of the process.
var process = func() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}()

// raftMetrics makes raft count for what it returns, from now on and for the whole process. None of
// the metrics is forgotten when it is not used for a while, as a counter would begin again.
func raftMetrics() (prometheus.Gatherer, error) {
	r := prometheus.NewRegistry()
	to, err := sink.NewPrometheusSinkFrom(sink.PrometheusOpts{Registerer: r, Name: "raft"})
	if err != nil {
		return nil, err
	}
	conf := metrics.DefaultConfig("")
	conf.EnableHostname, conf.EnableRuntimeMetrics = false, false
	if _, err := metrics.NewGlobal(conf, to); err != nil {
		return nil, err
	}
	return prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		all, err := r.Gather()
		for _, f := range all {
			respell(f)
		}
		return all, err
	}), nil
}

// hump is where a word begins in raft's names.
var hump = regexp.MustCompile(`([a-z])([A-Z])`)

// respell writes raft's names as Prometheus wants names to be: raft_fsm_applyBatch is
// raft_fsm_apply_batch, and a counter ends in _total.
func respell(f *dto.MetricFamily) {
	snake := func(s string) *string {
		s = strings.ToLower(hump.ReplaceAllString(s, "${1}_$2"))
		return &s
	}
	help := "Of hashicorp/raft, which calls it " + f.GetName() + "."
	f.Help, f.Name = &help, snake(f.GetName())
	if f.GetType() == dto.MetricType_COUNTER {
		*f.Name += "_total"
	}
	for _, m := range f.Metric {
		for _, l := range m.Label {
			l.Name = snake(l.GetName())
		}
	}
}

// metrics answers in Prometheus' text format, whether the node is ready or not.
func (s *server) metrics(c *call) error {
	c.waited = true // for a node that says nothing
	now, err := s.scrape(c.r.Context())
	if err != nil {
		return err
	}
	own := prometheus.NewRegistry()
	own.MustRegister(now)
	from := prometheus.Gatherers{own, process}
	if s.node.raftMetrics != nil {
		from = append(from, s.node.raftMetrics)
	}
	families, err := from.Gather()
	if err != nil {
		return err
	}
	var b bytes.Buffer
	format := expfmt.NewFormat(expfmt.TypeTextPlain)
	enc := expfmt.NewEncoder(&b, format)
	for _, f := range families {
		if err := enc.Encode(f); err != nil {
			return err
		}
	}
	h := c.w.Header()
	h["Content-Type"] = []string{string(format)}
	h["Content-Length"] = []string{strconv.Itoa(b.Len())}
	c.w.WriteHeader(http.StatusOK)
	return c.write(b.Bytes())
}
