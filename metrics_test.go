package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	prommodel "github.com/prometheus/common/model"
	"go.etcd.io/bbolt"
)

// metricsOf is what a node shows at /metrics, read as Prometheus does.
type metricsOf map[string]*dto.MetricFamily

// parseMetrics reads an answer of /metrics.
func parseMetrics(a *answer) (metricsOf, error) {
	if want := "text/plain; version=0.0.4; charset=utf-8"; a.status != http.StatusOK || a.header.Get("Content-Type") != want {
		return nil, fmt.Errorf("/metrics: %d, %s, want %s", a.status, a.header.Get("Content-Type"), want)
	}
	p := expfmt.NewTextParser(prommodel.LegacyValidation)
	return p.TextToMetricFamilies(bytes.NewReader(a.body))
}

// metrics asks a node for its metrics, as Prometheus does.
func (n *node) metrics(tb testing.TB) metricsOf {
	tb.Helper()
	a, err := do("GET", n.url+"/metrics", "", "", "Authorization", "Bearer "+readerKey)
	if err != nil {
		tb.Fatal(err)
	}
	m, err := parseMetrics(a)
	if err != nil {
		tb.Fatalf("%s: %v", n.id, err)
	}
	return m
}

// value is that of a gauge or a counter, and how often a histogram was used; labels are names and
// values in turn. ok is false where there is no such one.
func (m metricsOf) value(name string, labels ...string) (v float64, ok bool) {
	for _, one := range m[name].GetMetric() {
		have := map[string]string{}
		for _, l := range one.Label {
			have[l.GetName()] = l.GetValue()
		}
		want := map[string]string{}
		for pair := range slices.Chunk(labels, 2) {
			want[pair[0]] = pair[1]
		}
		if maps.Equal(have, want) {
			switch {
			case one.Gauge != nil:
				return one.Gauge.GetValue(), true
			case one.Counter != nil:
				return one.Counter.GetValue(), true
			case one.Histogram != nil:
				return float64(one.Histogram.GetSampleCount()), true
			}
		}
	}
	return 0, false
}

// want checks one value.
func (m metricsOf) want(tb testing.TB, v float64, name string, labels ...string) {
	tb.Helper()
	if got, ok := m.value(name, labels...); !ok || got != v && !(math.IsNaN(got) && math.IsNaN(v)) {
		tb.Errorf("%s %q is %v (%t), want %v", name, labels, got, ok, v)
	}
}

// TestMetrics: what the nodes of a cluster show is what has happened to them, from before they form a
// cluster to after their leader has gone; it is the manual's table and what deploy/ asks for; it is
// well formed, and tells nothing that is stored.
func TestMetrics(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, steady, addKey(limitedReaderKey, "Limited reader", "reader", "Namespaces", []string{"other"}))
	alone := c.nodes[0]
	alone.start()
	until(t, 10*time.Second, func() error { _, _, err := alone.status(); return err })
	m := alone.metrics(t)
	m.want(t, 0, "confman_ready")
	m.want(t, math.NaN(), "confman_staleness_seconds")
	m.want(t, 1, "confman_role", "role", "nonvoter")
	for _, n := range c.nodes[1:] {
		n.start()
	}
	c.ready()
	leader, followers := c.leader(), c.followers()

	const ns, key, value = "metricspace", "metrickey", "metricvalue"
	for i := range 3 {
		leader.put(t, ns, fmt.Sprint(key, i), value)
	}
	leader.delete(t, ns, key+"0")
	leader.put(t, "emptied", key, value)
	leader.delete(t, "emptied", key)
	c.converge()
	const entry, trail = "/api/v1/config/{ns}/{key...}", "/api/v1/audit/{ns}"
	f := followers[0]
	for _, r := range []struct {
		n                        *node
		method, path, key, body  string
		labelled, route, counted string
		status                   int
	}{
		{leader, "GET", keyPath(ns, key+"1"), readerKey, "", "GET", entry, "", 200},
		{leader, "HEAD", keyPath(ns, key+"1"), readerKey, "", "GET", entry, "", 200},
		{leader, "GET", keyPath(ns, "missing"), readerKey, "", "GET", entry, "", 404},
		{leader, "GET", keyPath(ns, "missing") + "?wait=50ms", readerKey, "", "GET", entry, "", 404},
		{leader, "GET", keyPath(ns, key+"1"), wrongKey, "", "GET", entry, "unauthorized", 401},
		{leader, "PUT", keyPath(ns, key+"1"), readerKey, "", "PUT", entry, "forbidden", 403},
		{leader, "GET", "/metrics", limitedReaderKey, "", "GET", "/metrics", "", 200},
		{leader, "HEAD", "/metrics", readerKey, "", "GET", "/metrics", "", 200},
		{leader, "GET", "/metrics?format=json", readerKey, "", "GET", "/metrics", "", 400},
		{leader, "BREW", keyPath(ns, key+"1"), readerKey, "", "none", "none", "", 405},
		{leader, "GET", "/nowhere/" + ns, readerKey, "", "none", "none", "", 404},
		{leader, "GET", "/api/v1/config//" + ns, readerKey, "", "none", "none", "", 400},
		{f, "PUT", keyPath(ns, key+"1"), adminKey, "", "PUT", entry, "", 307},
		{f, "DELETE", keyPath(ns, key+"1"), adminKey, "", "DELETE", entry, "", 307},
	} {
		was := r.n.metrics(t)
		a, err := do(r.method, r.n.url+r.path, r.key, r.body)
		if err != nil || a.status != r.status {
			t.Fatalf("%s %s: %v, %v", r.method, r.path, a, err)
		}
		m := r.n.metrics(t)
		labels := []string{"method", r.labelled, "route", r.route}
		more := func(of float64, name string, labels ...string) {
			t.Helper()
			before, _ := was.value(name, labels...)
			if r.route == "/metrics" && r.status == http.StatusOK && name == "confman_requests_total" {
				before++ // the scrape before
			}
			m.want(t, before+of, name, labels...)
		}
		more(1, "confman_requests_total", append(labels, "status", fmt.Sprint(r.status))...)
		if strings.Contains(r.path, "wait=") || r.route == "/metrics" && r.status == http.StatusOK {
			more(0, "confman_request_seconds", labels...)
		} else {
			more(1, "confman_request_seconds", labels...)
		}
		if r.counted != "" {
			more(1, "confman_refusals_total", "reason", r.counted)
		}
	}

	stream, _, err := openStream(f, ns, "")
	if err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() {
		a, err := do("GET", f.url+keyPath(ns, "awaited")+"?wait=1m", readerKey, "")
		if err == nil && a.status != http.StatusOK {
			err = errors.New(a.String())
		}
		waited <- err
	}()
	until(t, 10*time.Second, func() error {
		m := f.metrics(t)
		streams, _ := m.value("confman_streams")
		waits, _ := m.value("confman_waits")
		conns, _ := m.value("confman_connections")
		if streams != 1 || waits != 1 || conns < 3 {
			return fmt.Errorf("%v streams, %v waits, %v connections", streams, waits, conns)
		}
		return nil
	})
	leader.put(t, ns, "awaited", value)
	if err := <-waited; err != nil {
		t.Error(err)
	}
	stream.close()
	until(t, 10*time.Second, func() error {
		m := f.metrics(t)
		streams, _ := m.value("confman_streams")
		waits, _ := m.value("confman_waits")
		ended, _ := m.value("confman_requests_total", "method", "GET", "route", trail, "status", "200")
		if _, timed := m.value("confman_request_seconds", "method", "GET", "route", trail); streams != 0 || waits != 0 || ended != 1 || !timed {
			return fmt.Errorf("%v streams, %v waits, %v streams have ended", streams, waits, ended)
		}
		return nil
	})
	f.metrics(t).want(t, 0, "confman_request_seconds", "method", "GET", "route", trail)

	c.converge()
	pause := followers[1]
	pause.pause()
	const behind = 20
	for i := range behind {
		leader.put(t, ns, key+"1", fmt.Sprint(value, i))
	}
	start := time.Now()
	m = leader.metrics(t)
	if took := time.Since(start); took > limit(2*time.Second) {
		t.Errorf("with a node that stands still a scrape takes %v", took)
	}
	if lag, ok := m.value("confman_follower_lag_entries", "peer", pause.id); !ok || lag < behind {
		t.Errorf("the lag of a node that stands still is %v after %d writes", lag, behind)
	}
	pause.resume()
	st := c.converge()
	if st.Role != "leader" {
		_, st, _ = leader.status()
	}
	until(t, 10*time.Second, func() error {
		m = leader.metrics(t)
		for _, n := range followers {
			if lag, ok := m.value("confman_follower_lag_entries", "peer", n.id); !ok || lag != 0 {
				return fmt.Errorf("the lag of %s is %v", n.id, lag)
			}
		}
		if m["raft_leader_last_contact"] == nil {
			return errors.New("raft has not yet looked whom it has reached")
		}
		return nil
	})
	m.want(t, float64(st.Revision), "confman_revision")
	m.want(t, float64(st.Term), "confman_term")
	m.want(t, 1, "confman_ready")
	m.want(t, 1, "confman_role", "role", "leader")
	m.want(t, 0, "confman_role", "role", "follower")
	m.want(t, 3, "confman_keys")
	m.want(t, 2, "confman_namespaces")
	m.want(t, 0, "confman_unknown_outcomes_total")
	m.want(t, float64(st.Revision), "confman_commit_seconds")
	for _, name := range []string{"confman_apply_seconds", "confman_log_append_seconds"} {
		if n, _ := m.value(name); n < float64(st.Revision) {
			t.Errorf("%s counts %v for %d revisions", name, n, st.Revision)
		}
	}
	until(t, 10*time.Second, func() error {
		m := leader.metrics(t)
		for _, file := range []string{"state.db", "raft.db"} {
			info, err := os.Stat(filepath.Join(leader.data, file))
			if err != nil {
				return err
			}
			if size, _ := m.value("confman_file_bytes", "file", file); size != float64(info.Size()) {
				return fmt.Errorf("%s has %d bytes, not %v", file, info.Size(), size)
			}
		}
		return nil
	})
	if of, ok := f.metrics(t)["confman_follower_lag_entries"]; ok {
		t.Errorf("a follower shows the lag of others: %v", of)
	}

	checkExposition(t, leader)
	checkMetricNames(t, m)

	changes, _ := f.metrics(t).value("confman_leader_changes_total")
	leader.stop()
	c.leader()
	if now, _ := f.metrics(t).value("confman_leader_changes_total"); now != changes+1 {
		t.Errorf("%v leader changes, and after one more %v", changes, now)
	}
	leader.start()
	c.ready()
}

// checkExposition checks the form of what a node shows, and its labels.
func checkExposition(t *testing.T, n *node) {
	t.Helper()
	a := n.ask(t, "GET", "/metrics", "")
	problems, err := promlint.New(bytes.NewReader(a.body)).Lint()
	if err != nil {
		t.Error(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, secret := range []string{"metricspace", "metrickey", "metricvalue", "missing", "nowhere", "BREW", "ops@", "svc@", "Operators", n.data} {
		if strings.Contains(string(a.body), secret) {
			t.Errorf("/metrics holds %q", secret)
		}
	}
	routes := map[string]bool{"none none": true}
	for _, rt := range (&server{}).routes() {
		routes[rt.method+" "+rt.pattern] = true
	}
	m, err := parseMetrics(a)
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range m {
		prefix, _, _ := strings.Cut(name, "_")
		if !slices.Contains([]string{"confman", "raft", "go", "process"}, prefix) {
			t.Errorf("/metrics has %s", name)
		}
		for _, one := range f.Metric {
			of := map[string]string{}
			for _, l := range one.Label {
				of[l.GetName()] = l.GetValue()
			}
			if _, ok := of["route"]; ok && !routes[of["method"]+" "+of["route"]] {
				t.Errorf("%s: %v is no route", name, of)
			}
		}
	}
	for _, name := range []string{"raft_apply_total", "raft_fsm_apply_batch", "raft_replication_append_entries_rpc", "go_goroutines", "process_start_time_seconds"} {
		if m[name] == nil {
			t.Errorf("/metrics has no %s", name)
		}
	}
}

// manualMetrics are the metrics of the manual's table, with their types.
func manualMetrics(t *testing.T) map[string]string {
	t.Helper()
	said := map[string]string{}
	for _, r := range rows(chapter(t, "DIAGNOSTICS"), "`confman_.*`") {
		said[strings.Trim(r[0], "`")] = r[1]
		if len(r) != 4 || r[2] == "" {
			t.Errorf("%s: the manual's table does not say what it means", r[0])
		}
	}
	return said
}

// checkMetricNames holds the manual, and what deploy/ asks Prometheus for, against what a leader shows.
func checkMetricNames(t *testing.T, m metricsOf) {
	t.Helper()
	shown := map[string]string{}
	for name, f := range m {
		if strings.HasPrefix(name, "confman_") {
			shown[name] = strings.ToLower(f.GetType().String())
		}
	}
	if d := cmp.Diff(shown, manualMetrics(t)); d != "" {
		t.Errorf("metrics and types (-program +manual):\n%s", d)
	}
	for where, expr := range expressions(t) {
		for _, name := range metricNames(expr) {
			f := m[name]
			if f == nil {
				for _, part := range []string{"_bucket", "_sum", "_count"} {
					if whole, ok := strings.CutSuffix(name, part); ok && m[whole].GetType() == dto.MetricType_HISTOGRAM {
						f = m[whole]
					}
				}
			} else if f.GetType() == dto.MetricType_HISTOGRAM {
				t.Errorf("%s: %s is a histogram", where, name)
			}
			if f == nil {
				t.Errorf("%s asks for %s, which /metrics has not: %s", where, name, expr)
			}
		}
	}
}

// metricNames are the metrics in an expression.
func metricNames(expr string) []string {
	return regexp.MustCompile(`\b(?:confman|raft|go|process)_[a-z0-9_]+`).FindAllString(expr, -1)
}

// TestMetricsBeyondTraffic: what a test of a healthy cluster does not meet.
func TestMetricsBeyondTraffic(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	s := newReader(t, w)
	s.node.port = newPort("node1", nil, nil, slog.New(slog.DiscardHandler))
	read := func() metricsOf {
		t.Helper()
		rec := httptest.NewRecorder()
		r := httptest.NewRequest("GET", "/metrics", nil)
		r.Header.Set("X-API-Key", adminKey)
		s.ServeHTTP(rec, r)
		m, err := parseMetrics(&answer{rec.Code, rec.Header(), rec.Body.Bytes()})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}

	// An unknown outcome is that of a write.
	for _, r := range []struct {
		method string
		err    error
	}{{"PUT", errUnknown.because("?")}, {"PUT", errors.New("?")}, {"GET", errors.New("?")}, {"PUT", errNoLeader.because("?")}, {"PUT", nil}} {
		c := &call{s: s, r: httptest.NewRequest(r.method, "/", nil)}
		s.count(c, 504, 3*time.Second, r.err)
	}
	m := read()
	m.want(t, 2, "confman_unknown_outcomes_total")
	m.want(t, 5, "confman_requests_total", "method", "none", "route", "none", "status", "504")
	m.want(t, 5, "confman_request_seconds", "method", "none", "route", "none")
	for _, one := range m["confman_request_seconds"].Metric {
		if one.Label[1].GetValue() != "none" {
			continue
		}
		if sum := one.Histogram.GetSampleSum(); sum != 15 {
			t.Errorf("5 times 3 s are %v", sum)
		}
		for _, b := range one.Histogram.Bucket {
			want := uint64(0)
			if b.GetUpperBound() >= 3 {
				want = 5
			}
			if b.GetCumulativeCount() != want {
				t.Errorf("%d of 5 times 3 s took at most %v s", b.GetCumulativeCount(), b.GetUpperBound())
			}
		}
	}

	// Keys are counted anew when something has changed.
	counts := func(keys, namespaces float64) {
		t.Helper()
		m := read()
		m.want(t, keys, "confman_keys")
		m.want(t, namespaces, "confman_namespaces")
	}
	counts(0, 0)
	w.apply(set("a", "k", "v"), set("a", "l", "v"), set("b", "k", "v"))
	counts(3, 2)
	counts(3, 2)
	w.apply(unset("b", "k"), &command{Op: "drop", NS: "b", Actor: "ops@test"})
	counts(2, 1)
	w.apply(set("b", "k", "v"))
	counts(3, 2)

	// A damaged record is not counted around.
	err := w.st.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketNamespaces)
		rec := bytes.Clone(b.Get([]byte("b")))
		rec[len(rec)-1] ^= 1
		return b.Put([]byte("b"), rec)
	})
	if err != nil {
		t.Fatal(err)
	}
	s.census.done = false
	if _, err := s.scrape(t.Context()); !errors.Is(err, errCorrupt) {
		t.Errorf("keys are counted in spite of a damaged record: %v", err)
	}
}

// TestMetricsOfSnapshots: what is shown of snapshots is what is on the disk, and one that is not
// finished is not the newest.
func TestMetricsOfSnapshots(t *testing.T) {
	t.Parallel()
	d := newDisk(t.TempDir(), 1, slog.New(slog.DiscardHandler), nil)
	if d.snapshots.Load() != 0 || d.taken.Load() != 0 {
		t.Errorf("without snapshots: %d bytes, newest of %d", d.snapshots.Load(), d.taken.Load())
	}
	old, newer := time.Unix(1_700_000_000, 0), time.Unix(1_700_000_500, 0)
	for _, f := range []struct {
		path string
		size int
		when time.Time
	}{
		{"2-10-1/state.bin", 1000, old}, {"2-10-1/meta.json", 10, newer},
		{"2-20-2/state.bin", 3000, newer}, {"2-30-3.tmp/state.bin", 500, newer.Add(time.Hour)},
	} {
		path := filepath.Join(d.dir, "snapshots", f.path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, make([]byte, f.size), 0o600), os.Chtimes(path, f.when, f.when)); err != nil {
			t.Fatal(err)
		}
	}
	d.look()
	if d.snapshots.Load() != 4510 || d.newest.Load() != 3000 || d.taken.Load() != newer.UnixNano() {
		t.Errorf("%d bytes in all, %d in the newest, of %v", d.snapshots.Load(), d.newest.Load(), time.Unix(0, d.taken.Load()))
	}
}

// BenchmarkCount measures what counting adds to each request, in time of a processor: others may have
// it meanwhile.
func BenchmarkCount(b *testing.B) {
	w := newWriter(b, b.TempDir())
	s := newReader(b, w)
	var rt *route
	for r := range s.tallies {
		if r != nil && r.method == "GET" {
			rt = r
		}
	}
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	r := httptest.NewRequest("GET", "/", nil)
	b.ReportAllocs()
	b.ResetTimer()
	before := used()
	b.RunParallel(func(pb *testing.PB) {
		c := &call{s: s, r: r, route: rt}
		for pb.Next() {
			s.count(c, 200, 70*time.Microsecond, nil)
		}
	})
	each := (used() - before) / time.Duration(b.N)
	b.ReportMetric(float64(each), "cpu-ns/op")
	const ordered = time.Microsecond / 2
	if b.N > 100_000 && each > ordered {
		b.Errorf("counting a request takes %v, ordered is %v", each, ordered)
	}
}
