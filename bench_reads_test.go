package main

// Benchmarks of what reads promise: answers of a confirmed age, and changes that reach
// everyone who waits. The cluster and the clients are those of bench_test.go.

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkConsistent measures clients that read with ?consistent, beside the same with plain
// reads in the same run.
func BenchmarkConsistent(b *testing.B) {
	c := startCluster(b, 3)
	preload(b, c)
	for _, m := range []struct {
		role, form, query string
		rate              float64
	}{
		{"leader", "plain", "", 0}, {"leader", "consistent", "?consistent", 30_000},
		{"follower", "plain", "", 0}, {"follower", "consistent", "?consistent", 25_000},
	} {
		b.Run(fmt.Sprintf("node=%s/form=%s", m.role, m.form), func(b *testing.B) {
			n := c.leader()
			if m.role == "follower" {
				n = c.followers()[0]
			}
			before := applied(b, n)
			measure(b, n.api, 64, 20_000, target{rate: m.rate}, func() func(int) []byte {
				r := newGet(m.query)
				return func(int) []byte { return r.with(rand.IntN(benchKeys()), 0) }
			})
			b.ReportMetric(float64(applied(b, n)-before), "log-entries")
		})
	}
}

// applied is how far raft's log has come at a node, as nodes ask each other for it.
func applied(tb testing.TB, n *node) (index int) {
	tb.Helper()
	a, err := inquire(portOf(tb, another(n), []*node{n}, clusterSecret), n.id, "GET", "/applied", "")
	if err == nil {
		index, err = strconv.Atoi(string(a.body))
	}
	if err != nil {
		tb.Fatal(err)
	}
	return index
}

// A tap is an open event stream at its least: it tells when it hears of a revision.
type tap struct {
	wire *wire
	body *bufio.Reader
}

// openTap opens a stream of ns at addr and waits until it has begun.
func openTap(addr, ns string) (*tap, error) {
	w, err := dial(addr)
	if err != nil {
		return nil, err
	}
	w.conn.SetDeadline(time.Now().Add(wireLimit))
	if _, err := fmt.Fprintf(w.conn, "GET /api/v1/audit/%s HTTP/1.1\r\nHost: bench\r\nX-API-Key: %s\r\nAccept: text/event-stream\r\n\r\n", ns, adminKey); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(w.r, nil)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("stream of %s: status %d", ns, resp.StatusCode)
	}
	t := &tap{w, bufio.NewReader(resp.Body)}
	if line, err := t.body.ReadSlice('\n'); err != nil || line[0] != ':' {
		return nil, fmt.Errorf("stream of %s begins with %q, %v", ns, line, err)
	}
	w.conn.SetDeadline(time.Time{})
	return t, nil
}

// next waits for an event and returns its revision.
func (t *tap) next() (rev uint64, err error) {
	for {
		line, err := t.body.ReadSlice('\n')
		if err == bufio.ErrBufferFull {
			continue // a long line of data, in parts
		}
		if err != nil {
			return 0, err
		}
		if id, ok := bytes.CutPrefix(line, []byte("id: ")); ok {
			id, _, _ = bytes.Cut(id, []byte("-"))
			return strconv.ParseUint(string(id), 10, 64)
		}
	}
}

// openTaps opens n streams, some at once.
func openTaps(tb testing.TB, addr, ns string, n int) []*tap {
	tb.Helper()
	taps, errs := make([]*tap, n), make([]error, n)
	var wg sync.WaitGroup
	var next atomic.Int64
	for range 16 {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				taps[i], errs[i] = openTap(addr, ns)
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			tb.Fatal(err)
		}
	}
	return taps
}

func closeTaps(taps []*tap) {
	for _, t := range taps {
		t.wire.conn.Close()
	}
}

// BenchmarkNotify measures how long after the leader's acknowledgement of a change, of which
// 100 are made each second, a client at a follower has heard of it: one on a stream and one
// in a long-poll.
func BenchmarkNotify(b *testing.B) {
	c := startCluster(b, 3)
	preload(b, c)
	for _, by := range []string{"stream", "wait"} {
		b.Run("by="+by, func(b *testing.B) {
			leader, follower := c.leader(), c.followers()[0]
			etag := leader.put(b, "news", "k", fmt.Sprint(by, b.N, "first")).Revision
			c.converge()
			heard := make(chan error, 1) // one for each change
			var at time.Time
			var listen func(rev uint64)
			if by == "stream" {
				t, err := openTap(follower.api, "news")
				if err != nil {
					b.Fatal(err)
				}
				defer t.wire.conn.Close()
				listen = func(rev uint64) {
					got, err := t.next()
					at = time.Now()
					if err == nil && got != rev {
						err = fmt.Errorf("the stream tells of revision %d, want %d", got, rev)
					}
					heard <- err
				}
			} else {
				w := newFleet(b, follower.api, 1)[0]
				listen = func(rev uint64) {
					err := w.exchange(fmt.Appendf(nil, "GET %s?wait=10s HTTP/1.1\r\nHost: bench\r\nX-API-Key: %s\r\nIf-None-Match: \"%d\"\r\n\r\n",
						keyPath("news", "k"), adminKey, rev-1))
					at = time.Now()
					if err == nil && w.etag != rev {
						err = fmt.Errorf("the wait ends with revision %d, want %d", w.etag, rev)
					}
					heard <- err
				}
			}
			writer := newFleet(b, leader.api, 1)[0]
			pace := time.NewTicker(10 * time.Millisecond)
			defer pace.Stop()
			var took []time.Duration
			for b.Loop() {
				for range atLeast() {
					etag++
					go listen(etag)
					<-pace.C // the long-poll comes meanwhile
					body := fmt.Sprintf(`{"value":"%s%d"}`, by, etag)
					if err := writer.exchange(fmt.Appendf(nil, "PUT %s HTTP/1.1\r\nHost: bench\r\nX-API-Key: %s\r\nContent-Length: %d\r\n\r\n%s",
						keyPath("news", "k"), adminKey, len(body), body)); err != nil || writer.etag != etag {
						b.Fatalf("PUT: status %d, revision %d, want %d: %v", writer.status, writer.etag, etag, err)
					}
					acknowledged := time.Now()
					if err := <-heard; err != nil {
						b.Fatal(err)
					}
					took = append(took, max(at.Sub(acknowledged), 0))
				}
			}
			report(b, took, 0, target{p99: 20 * time.Millisecond})
		})
	}
}

// resident is how many bytes of memory a node's process holds.
func resident(tb testing.TB, n *node) int {
	tb.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.cmd.Process.Pid))
	if err != nil {
		tb.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "RssAnon:")
	var kb int
	if _, err := fmt.Sscan(rest, &kb); err != nil {
		tb.Fatal(err)
	}
	return kb << 10
}

// BenchmarkIdleStreams measures what many streams cost that have nothing to tell: memory of
// their node, and time of the writes to another namespace, with the streams and without in turn.
func BenchmarkIdleStreams(b *testing.B) {
	streams, writes := 5_000, 2_000
	if testing.Short() {
		streams, writes = 200, 100
	}
	c := startCluster(b, 3)
	leader := c.leader()
	leader.put(b, "idle", "k", "v")
	c.converge()
	fleet := newFleet(b, leader.api, 8)
	var value atomic.Int64
	write := func() []time.Duration {
		return fleet.drive(b, writes, func() func(int) []byte {
			r := newPut()
			return func(int) []byte { return r.with(rand.IntN(1000), int(value.Add(1))) }
		})
	}
	write() // makes the keys
	var without, with []time.Duration
	each := 0
	for b.Loop() {
		without = append(without, write()...)
		before := resident(b, leader)
		taps := openTaps(b, leader.api, "idle", streams)
		each = max(each, (resident(b, leader)-before)/streams)
		with = append(with, write()...)
		with = append(with, write()...)
		closeTaps(taps)
		without = append(without, write()...)
	}
	mean := func(took []time.Duration) (sum time.Duration) {
		for _, d := range took {
			sum += d
		}
		return sum / time.Duration(len(took))
	}
	b.ReportMetric(float64(each)/1000, "KB/stream")
	b.ReportMetric(40, "KB/stream-target")
	b.ReportMetric(float64(mean(without))/1e6, "write-without-ms")
	b.ReportMetric(float64(mean(with))/1e6, "write-with-ms")
	b.ReportMetric(100*float64(mean(with)-mean(without))/float64(mean(without)), "delay-%")
	b.ReportMetric(20, "delay-%-target")
}

// BenchmarkFanOut measures how long after its acknowledgement one change has reached the last
// of a thousand streams of a follower.
func BenchmarkFanOut(b *testing.B) {
	streams := 1_000
	if testing.Short() {
		streams = 100
	}
	c := startCluster(b, 3)
	leader, follower := c.leader(), c.followers()[0]
	leader.put(b, "news", "k", "first")
	c.converge()
	taps := openTaps(b, follower.api, "news", streams)
	type told struct {
		rev uint64
		at  time.Time
		err error
	}
	tell, over := make(chan told, streams), make(chan struct{})
	var wg sync.WaitGroup
	for _, t := range taps {
		wg.Go(func() {
			for {
				rev, err := t.next()
				select {
				case tell <- told{rev, time.Now(), err}:
				case <-over:
				}
				if err != nil {
					return
				}
			}
		})
	}
	defer func() {
		close(over)
		closeTaps(taps)
		wg.Wait()
	}()
	var took []time.Duration
	for b.Loop() {
		for range atLeast() {
			rev := leader.put(b, "news", "k", strconv.Itoa(len(took))).Revision
			acknowledged := time.Now()
			last := acknowledged
			for range taps {
				t := <-tell
				if t.err != nil || t.rev != rev {
					b.Errorf("a stream tells of revision %d, %v, want %d", t.rev, t.err, rev)
					return
				}
				if t.at.After(last) {
					last = t.at
				}
			}
			took = append(took, last.Sub(acknowledged))
		}
	}
	report(b, took, 0, target{p99: 50 * time.Millisecond})
}
