package main

// What grows: a long run at half of the maximum rate, with streams, in which memory, goroutines,
// threads, descriptors and the log must stay as they are. Only the trail may grow, for it is kept.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A footprint is what a node takes of its machine.
type footprint struct {
	memory   int64 // bytes that are not a file's: RssAnon
	threads  int64
	routines int64 // goroutines
	files    int64 // descriptors
	log      int64 // bytes of raft.db on the disk
	snaps    int64 // bytes of snapshots
	state    int64 // bytes of state.db
}

// footprint reads it from outside.
func (n *node) footprint(tb testing.TB) (f footprint) {
	tb.Helper()
	proc := fmt.Sprintf("/proc/%d", n.cmd.Process.Pid)
	status, err := os.ReadFile(proc + "/status")
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		number, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64) // most are no numbers
		switch name {
		case "RssAnon":
			f.memory = number << 10
		case "Threads":
			f.threads = number
		}
	}
	said := strings.Count(n.logged(), goroutinesLine)
	n.signal(syscall.SIGUSR1)
	until(tb, 10*time.Second, func() error {
		log := n.logged()
		at := strings.LastIndex(log, goroutinesLine)
		line, _, whole := strings.Cut(log[max(at, 0):], "\n")
		if !whole || strings.Count(log, goroutinesLine) == said {
			return errors.New("it does not say how many goroutines it has")
		}
		f.routines, err = strconv.ParseInt(strings.TrimPrefix(line, goroutinesLine), 10, 64)
		return err
	})
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		tb.Fatal(err)
	}
	f.files = int64(len(fds))
	filepath.WalkDir(n.data, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // snapshots come and go
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		switch size := info.Size(); {
		case d.Name() == "raft.db":
			f.log = size
		case d.Name() == "state.db":
			f.state = size
		case strings.Contains(path, "/snapshots/") && !d.IsDir():
			f.snaps += size
		}
		return nil
	})
	return f
}

// TestSoak takes 10 minutes; CONFMAN_SOAK=1m tries it out.
func TestSoak(t *testing.T) {
	long(t)
	length := 10 * time.Minute
	if s := os.Getenv("CONFMAN_SOAK"); s != "" {
		var err error
		if length, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	c := startCluster(t, 3)
	preload(t, c)
	leader := c.leader()
	fleet := newFleet(t, leader.api, 64)
	var value atomic.Int64
	job := func() func(int) []byte {
		r := newPut()
		return func(int) []byte { return r.with(rand.IntN(benchKeys()), int(value.Add(1))) }
	}
	start := time.Now()
	took := fleet.drive(t, 20_000, job)
	most := float64(len(took)) / time.Since(start).Seconds()
	half := most / 2
	t.Logf("at most %.0f writes/s; %v at %.0f", most, length, half)

	ctx, end := context.WithTimeout(context.Background(), length)
	defer end()
	var helpers sync.WaitGroup
	defer helpers.Wait()
	var events, streams atomic.Int64
	stream := func(ctx context.Context, n *node) error {
		req, err := http.NewRequestWithContext(ctx, "GET", n.url+"/api/v1/audit/bench", nil)
		if err != nil {
			return err
		}
		req.Header.Set("X-API-Key", adminKey)
		req.Header.Set("Accept", "text/event-stream")
		resp, err := (&http.Client{Transport: transport}).Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode == http.StatusServiceUnavailable {
			time.Sleep(20 * time.Millisecond) // the pace of the question: another node has begun to lead
			return nil
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("stream at %s: %s", n.id, resp.Status)
		}
		streams.Add(1)
		lines := bufio.NewScanner(resp.Body)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "id: ") {
				events.Add(1)
			}
		}
		return lines.Err()
	}
	for _, n := range c.nodes {
		for i := range 4 {
			helpers.Go(func() {
				for ctx.Err() == nil {
					life, done := ctx, context.CancelFunc(func() {})
					if i > 0 { // one stays, the others come and go
						life, done = context.WithTimeout(ctx, time.Duration(i)*time.Second)
					}
					err := stream(life, n)
					if err != nil && life.Err() == nil {
						t.Error(err)
						end()
					}
					done()
				}
			})
		}
	}

	// The pace: tokens for half the rate, dropped where the nodes cannot keep up.
	tokens := make(chan struct{}, int(half)+1)
	helpers.Go(func() {
		defer close(tokens)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		began, given := time.Now(), 0
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			for ; float64(given) < half*time.Since(began).Seconds(); given++ {
				select {
				case tokens <- struct{}{}:
				default:
				}
			}
		}
	})
	var writes atomic.Int64
	for _, w := range fleet {
		helpers.Go(func() {
			next := job()
			for range tokens {
				err := w.exchange(next(0))
				if err == nil && (w.status == http.StatusTemporaryRedirect || w.status == http.StatusServiceUnavailable) {
					w = newFleet(t, c.leader().api, 1)[0] // another node has begun to lead
					continue
				}
				if err != nil || w.status/100 != 2 {
					t.Errorf("write: status %d, %v", w.status, err)
					end()
					return
				}
				writes.Add(1)
			}
		})
	}

	settled := min(2*time.Minute, length/5)
	type sample struct {
		at time.Duration
		of []footprint
	}
	var samples []sample
	tick := time.NewTicker(min(10*time.Second, length/60))
	defer tick.Stop()
	start = time.Now()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
			s := sample{at: time.Since(start)}
			for _, n := range c.nodes {
				s.of = append(s.of, n.footprint(t))
			}
			samples = append(samples, s)
		}
	}
	helpers.Wait()
	t.Logf("%d writes, %.0f/s; %d events of %d streams", writes.Load(), float64(writes.Load())/length.Seconds(), events.Load(), streams.Load())

	// Peaks of a window, after things have settled and at the end: collections and snapshots make waves.
	window := length / 5
	peak := func(i int, from, to time.Duration) (p footprint) {
		for _, s := range samples {
			if s.at < from || s.at > to {
				continue
			}
			f := s.of[i]
			p = footprint{max(p.memory, f.memory), max(p.threads, f.threads), max(p.routines, f.routines), max(p.files, f.files), max(p.log, f.log), max(p.snaps, f.snaps), max(p.state, f.state)}
		}
		return p
	}
	for i, n := range c.nodes {
		was, is := peak(i, settled, settled+window), peak(i, length-window, length+time.Minute)
		for _, g := range []struct {
			what          string
			was, is, most int64
		}{
			{"bytes of memory", was.memory, is.memory, was.memory + was.memory/4 + 32<<20},
			{"threads", was.threads, is.threads, was.threads + 8},
			{"goroutines", was.routines, is.routines, was.routines + was.routines/4 + 32},
			{"descriptors", was.files, is.files, was.files + 16},
			// The trail is kept, so the state grows; the log may with it, see takeSnapshots, and outgrow it never.
			{"bytes of raft.db", was.log, is.log, is.state/2 + 32<<20},
			{"bytes of snapshots", was.snaps, is.snaps, 3*is.state + 32<<20},
			{"bytes of state.db", was.state, is.state, 1 << 62}, // the trail: for the reader of the log
		} {
			t.Logf("%s: %d %s, then %d", n.id, g.was, g.what, g.is)
			if g.is > g.most {
				t.Errorf("%s: %s grew from %d to %d", n.id, g.what, g.was, g.is)
			}
		}
	}
	verify(c)
}
