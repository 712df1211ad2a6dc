package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// limits sets members of Limits: names and numbers in turn.
func limits(of ...any) edit {
	return func(doc map[string]any) {
		members := map[string]any{}
		for i := 0; i < len(of); i += 2 {
			members[of[i].(string)] = of[i+1]
		}
		doc["Limits"] = members
	}
}

// TestLimitMistakes: a limit that cannot be kept is refused by its name.
func TestLimitMistakes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, m := range []struct{ members, want string }{
		{`"MaxValueBytes": 0`, "Limits.MaxValueBytes"},
		{`"MaxValueBytes": 4194305, "MaxBodyBytes": 8388608`, "Limits.MaxValueBytes"},
		{`"MaxValueBytes": 1048576, "MaxBodyBytes": 1048575`, "Limits.MaxBodyBytes"},
		{`"MaxBodyBytes": 8388609`, "Limits.MaxBodyBytes"},
		{`"MaxHeaderBytes": 4095`, "Limits.MaxHeaderBytes"},
		{`"MaxHeaderBytes": 1048577`, "Limits.MaxHeaderBytes"},
		{`"MaxConnections": 15`, "Limits.MaxConnections"},
		{`"MaxStreams": 0`, "Limits.MaxStreams"},
		{`"MaxStreamsPerKey": -1`, "Limits.MaxStreamsPerKey"},
		{`"AuthFailuresPerMinute": 0`, "Limits.AuthFailuresPerMinute"},
		{`"AuthFailuresPerMinute": 1.5`, "Limits.AuthFailuresPerMinute"},
		{`"MaxValues": 1`, "Limits.MaxValues"},
		{`"MaxValueBytes": 4194304, "MaxBodyBytes": 8388608, "MaxHeaderBytes": 1048576, "MaxConnections": 16, "MaxStreams": 1, "MaxStreamsPerKey": 1, "AuthFailuresPerMinute": 1`, ""},
	} {
		path := filepath.Join(dir, "limits.json")
		writeFile(t, path, []byte(strings.Replace(sample, `"Cluster"`, `"Limits": {`+m.members+`}, "Cluster"`, 1)))
		_, err := loadConfig(path, "")
		if (err == nil) != (m.want == "") || err != nil && !(strings.Contains(err.Error(), m.want+":") && strings.Contains(err.Error(), path)) {
			t.Errorf("%s: %v", m.members, err)
		}
	}
}

// TestSizes: the sizes that are configured hold, up to the largest, also through a follower that
// forwards.
func TestSizes(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1, limits("MaxValueBytes", 100, "MaxBodyBytes", 200, "MaxHeaderBytes", 4096))
	n := c.nodes[0]
	for _, m := range []struct {
		body   string
		header int
		status int
	}{
		{`{"value":"` + strings.Repeat("x", 100) + `"}`, 0, 201},
		{`{"value":"` + strings.Repeat("x", 101) + `"}`, 0, 413},
		{`{"value":"x"}` + strings.Repeat(" ", 200-13), 0, 200},
		{`{"value":"x"}` + strings.Repeat(" ", 201-13), 0, 413},
		{`{"value":"y"}`, 4000, 200},
		{`{"value":"z"}`, 13_000, 431},
	} {
		a, err := do("PUT", n.url+keyPath("app", "k"), adminKey, m.body, "X-Padding", strings.Repeat("x", m.header))
		if err != nil || a.status != m.status {
			t.Errorf("a body of %d bytes, a header of %d: %v, %v, want %d", len(m.body), m.header, a, err, m.status)
		}
	}

	// Nothing is larger in raft's log than a control character, which is written as six.
	c = startCluster(t, 3, calm, with("Cluster", "Forward", true), limits("MaxValueBytes", 4<<20, "MaxBodyBytes", 8<<20, "MaxHeaderBytes", 8192))
	follower := c.followers()[0]
	large := strings.Repeat("\x01", rounds(1<<20, 4<<20))
	for i, text := range []string{large, large[1:]} { // the second event holds both
		// 24 MB of log on three nodes take their time on a machine that has others to do.
		a, err := doWith(streaming, "PUT", follower.url+keyPath("app", "k")+"?raw", adminKey, text, "X-Padding", strings.Repeat("x", 8192+3500))
		if err != nil || a.status/100 != 2 || len(a.body) < 6*len(text) {
			t.Fatalf("large value %d: %.300v, %v", i, a, err)
		}
	}
	if a := follower.ask(t, "GET", keyPath("app", "k")+"?raw", ""); string(a.body) != large[1:] {
		t.Errorf("%d bytes came back: %.100v", len(a.body), a)
	}
}

// TestMaxStreams: streams and waits have places, in all and for each key, and give them back.
func TestMaxStreams(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1, limits("MaxStreams", 3, "MaxStreamsPerKey", 2))
	n := c.nodes[0]
	rev := n.put(t, "app", "k", "v").Revision
	open := func(key string) *pending {
		t.Helper()
		p := newPending(t, n)
		fmt.Fprintf(p.conn, "GET /api/v1/audit/app HTTP/1.1\r\nHost: test\r\nX-API-Key: %s\r\nAccept: text/event-stream\r\n\r\n", key)
		resp, err := http.ReadResponse(p.r, nil)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("a stream: %v, %v", resp, err)
		}
		return p
	}
	stream := []string{"Accept", "text/event-stream"}
	wait := []string{"If-None-Match", fmt.Sprintf(`"%d"`, rev)}
	refused := func(what, key, path string, headers []string, limit string) {
		t.Helper()
		a, err := do("GET", n.url+path, key, "", headers...)
		if err != nil || a.status != http.StatusTooManyRequests || a.slug() != "too-many-requests" || a.header.Get("Retry-After") == "" || !strings.Contains(string(a.body), limit) {
			t.Errorf("%s: %v, %v, want a 429 that names %s", what, a, err, limit)
		}
	}
	first := open(adminKey)
	open(adminKey)
	refused("a key's third stream", adminKey, "/api/v1/audit/app", stream, "Limits.MaxStreamsPerKey")
	refused("a wait beside a key's two streams", adminKey, keyPath("app", "k")+"?wait=5s", wait, "Limits.MaxStreamsPerKey")
	if a, err := do("GET", n.url+keyPath("app", "k"), adminKey, ""); err != nil || a.status != http.StatusOK {
		t.Errorf("a read beside them: %v, %v", a, err)
	}
	open(readerKey)
	refused("a fourth stream", readerKey, "/api/v1/audit/app", stream, "Limits.MaxStreams")
	first.conn.Close()
	until(t, 10*time.Second, func() error {
		a, err := do("GET", n.url+keyPath("app", "k")+"?wait=1ms", adminKey, "", wait...)
		if err == nil && a.status != http.StatusNotModified {
			err = errors.New(a.String())
		}
		return err
	})
}

// TestMaxConnections: a house full of idle connections locks nobody out; one that is full of busy ones
// makes others wait, and lets them in when one leaves.
func TestMaxConnections(t *testing.T) {
	t.Parallel()
	const most = 16
	c := startCluster(t, 1, limits("MaxConnections", most))
	n := c.nodes[0]
	rev := n.put(t, "app", "k", "v").Revision
	ask := func() *pending {
		t.Helper()
		p := newPending(t, n)
		fmt.Fprintf(p.conn, "GET /health HTTP/1.1\r\nHost: test\r\n\r\n")
		return p
	}
	answered := func(p *pending) {
		t.Helper()
		p.conn.SetDeadline(time.Now().Add(limit(10 * time.Second)))
		if a, err := p.answer(); err != nil || a.status != http.StatusOK {
			t.Fatalf("%v, %v", a, err)
		}
	}
	for range 3 * most {
		answered(ask())
	}
	hold := func(wait string) *pending {
		t.Helper()
		p := newPending(t, n)
		if err := p.send("GET", keyPath("app", "k")+"?wait="+wait, "", "If-None-Match", strconv.Quote(strconv.FormatUint(rev, 10))); err != nil {
			t.Fatal(err)
		}
		return p
	}
	first := hold("1m")
	for range most - 2 {
		hold("1m")
	}
	short := hold("3s")
	late := func() *pending { // nobody else is let in
		t.Helper()
		p := ask()
		p.conn.SetDeadline(time.Now().Add(500 * time.Millisecond))
		if a, err := p.answer(); err == nil {
			t.Errorf("with %d waits open another connection is answered with %v", most, a)
		}
		return p
	}
	// One whose answer has come makes room, and so does one who leaves.
	answered(late())
	if a, err := short.answer(); err != nil || a.status != http.StatusNotModified {
		t.Errorf("%v, %v", a, err)
	}
	hold("1m")
	p := late()
	first.conn.Close()
	answered(p)
}

// TestConnections: clients leave a node the files that it needs for itself.
func TestConnections(t *testing.T) {
	t.Parallel()
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct {
		configured int
		warns      bool
	}{{16, false}, {int(files.Cur) - ownFiles, false}, {int(files.Cur) - ownFiles + 1, true}, {1_000_000, true}} {
		var logged strings.Builder
		c := defaults()
		c.Limits.MaxConnections = m.configured
		got := c.connections(slog.New(slog.NewTextHandler(&logged, nil)))
		want := min(m.configured, max(int(files.Cur)-ownFiles, int(files.Cur)/2))
		if got != want || m.warns != (logged.String() != "") {
			t.Errorf("MaxConnections %d with %d files: %d, want %d; the log says %q", m.configured, files.Cur, got, want, logged.String())
		}
	}
}

// TestAuthFailures: an address that has tried too many keys is told to wait, and whoever has a right one
// is not, from the same address, whatever others do there.
func TestAuthFailures(t *testing.T) {
	t.Parallel()
	const most = 20
	c := startCluster(t, 1, limits("AuthFailuresPerMinute", most))
	n := c.nodes[0]
	n.put(t, "app", "k", "v")
	ask := func(from, key, method string) int {
		t.Helper()
		r := &rawRequest{addr: n.api, from: from, method: method, target: keyPath("app", "k")}
		if key != "" {
			r.header = []string{"X-API-Key: " + key}
		}
		a, err := r.send()
		if err != nil {
			t.Fatal(err)
		}
		if after, err := strconv.Atoi(a.Header.Get("Retry-After")); a.StatusCode == 429 && (err != nil || after < 1 || after > 61) {
			t.Errorf("Retry-After is %q", a.Header.Get("Retry-After"))
		}
		return a.StatusCode
	}
	start := time.Now()
	got := map[int]int{}
	for i := range 10 * most {
		got[ask("127.0.0.3", []string{wrongKey, ""}[i%2], "GET")]++
		if s := ask("127.0.0.3", adminKey, "GET"); s != 200 {
			t.Fatalf("a right key is answered with %d after %v", s, got)
		}
	}
	if s := ask("127.0.0.3", readerKey, "DELETE"); s != 403 {
		t.Errorf("a key that is not allowed to is answered with %d", s)
	}
	if s := ask("127.0.0.4", wrongKey, "GET"); s != 401 {
		t.Errorf("another address is answered with %d", s)
	}
	if took := time.Since(start); took > 50*time.Second {
		t.Logf("it took %v, more than one minute may have begun", took)
	} else if got[401] != most || got[429] != 9*most {
		t.Errorf("%v, want %d times 401", got, most)
	}
	lines := strings.Count(n.logged(), "source=127.0.0.3 ")
	if lines < addressLines || lines > addressLines+1 && time.Since(start) < 50*time.Second {
		t.Errorf("%d lines about refusals of one address", lines)
	}
	if trail := n.trail(t, ""); len(trail) != 1 {
		t.Errorf("the trail has %d events, want that of one write", len(trail))
	}
}

// TestRefusals: what is kept of those who are refused, and what is logged, is bounded, whatever number of
// addresses they have; the next minute begins anew, and the log says what it does not show.
func TestRefusals(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var logged strings.Builder
		r := &refusals{log: slog.New(slog.NewTextHandler(&logged, nil)), most: 2}
		for _, m := range []struct {
			addr string
			over bool
		}{
			{"192.0.2.1", false}, {"192.0.2.1", false}, {"192.0.2.1", true}, {"::ffff:192.0.2.1", true}, {"192.0.2.2", false},
			{"2001:db8::1", false}, {"2001:db8::ffff:0:0:1", false}, {"2001:db8::2", true}, {"2001:db8:0:1::2", false},
			{"fe80::1%a", false}, {"fe80::1%b", false}, {"fe80::2", true},
		} {
			if wait := r.failed(m.addr); (wait > 0) != m.over || wait > time.Minute {
				t.Errorf("%s has to wait for %v", m.addr, wait)
			}
		}
		loud := 0
		for i := range 3 * maxAddresses {
			addr := fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&0xff, i&0xff)
			r.failed(addr)
			if r.logged(addr) {
				loud++
			}
		}
		if len(r.of) > maxAddresses+1 || loud != allLines {
			t.Errorf("%d addresses are kept, %d lines logged", len(r.of), loud)
		}
		if r.failed("203.0.113.1") == 0 {
			t.Error("an address for which there is no room has failures left that its like have used up")
		}
		r.count(errUnauthorized)
		time.Sleep(time.Minute)
		synctest.Wait()
		if r.of != nil || r.failed("192.0.2.1") > 0 || !r.logged("192.0.2.1") {
			t.Error("the next minute remembers the last one")
		}
		want := fmt.Sprintf("count=%d addresses=%d unauthorized=1 forbidden=0 tooManyRequests=0", 3*maxAddresses-allLines, maxAddresses+1)
		if !strings.Contains(logged.String(), want) || strings.Count(logged.String(), "\n") != 1 {
			t.Errorf("the log says %q, want %q", logged.String(), want)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if strings.Count(logged.String(), "\n") != 1 {
			t.Errorf("a quiet minute is logged: %q", logged.String())
		}
	})
}

// TestNoCore: a node leaves no core dump, whatever the limit of who starts it.
func TestNoCore(t *testing.T) {
	t.Parallel()
	var core syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_CORE, &core); err != nil {
		t.Fatal(err)
	}
	core.Cur = core.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_CORE, &core); err != nil {
		t.Fatal(err)
	}
	c := startCluster(t, 1)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", c.nodes[0].cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok {
			if f := strings.Fields(rest); f[0] != "0" || f[1] != "0" {
				t.Errorf("core dumps have the limit %v", f)
			}
			return
		}
	}
	t.Errorf("no limit of core dumps in %s", text)
}

// TestSlowClients: five hundred clients who send a byte now and then, or nothing, or take nothing, do not
// slow down one who does neither, and are cut.
func TestSlowClients(t *testing.T) {
	if os.Getenv("CONFMAN_LONG") == "" {
		t.Parallel() // beside others it cannot see more than that somebody waits for a slow client
	}
	const slow = 500
	c := startCluster(t, 1, calm)
	n := c.nodes[0]
	n.put(t, "app", "k", "v")
	n.put(t, "app", "large", strings.Repeat("x", 1<<20))
	healthy := func(d time.Duration) time.Duration {
		t.Helper()
		var took []time.Duration
		for end := time.Now().Add(d); time.Now().Before(end) || len(took) < 1000; {
			start := time.Now()
			if a, err := do("GET", n.url+keyPath("app", "k"), readerKey, ""); err != nil || a.status != http.StatusOK {
				t.Fatalf("%v, %v", a, err)
			}
			took = append(took, time.Since(start))
		}
		return sortedQuantile(took, 0.99)
	}
	period := time.Duration(rounds(2, 20)) * time.Second
	without := healthy(period)
	stop := make(chan struct{})
	var conns []net.Conn
	for i := range slow {
		conn, err := net.Dial("tcp", n.api)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
		go func() { // it ends with its connection or the test
			switch i % 4 {
			case 0: // nothing
			case 1: // a head, byte by byte
				trickle(conn, "GET "+keyPath("app", "k")+" HTTP/1.1\r\nHost: test\r\nX-Padding: "+strings.Repeat("x", 1000), stop)
			case 2: // a body, byte by byte
				fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: test\r\nX-API-Key: %s\r\nContent-Length: 1000\r\n\r\n", keyPath("app", "slow"), adminKey)
				trickle(conn, strings.Repeat(" ", 1000), stop)
			case 3: // answers that are not taken
				fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: test\r\nX-API-Key: %s\r\n\r\n", keyPath("app", "large"), readerKey)
			}
		}()
	}
	with := healthy(period)
	close(stop)
	t.Logf("p99 %v without them, %v with", without, with)
	if with > max(2*without, limit(time.Duration(rounds(50, 5))*time.Millisecond)) {
		t.Errorf("with %d slow clients p99 is %v, without %v", slow, with, without)
	}
	// Who sends no head is cut after 5 seconds.
	for _, i := range []int{0, 1} {
		conns[i].SetReadDeadline(time.Now().Add(limit(15 * time.Second)))
		if b, err := io.ReadAll(conns[i]); errors.Is(err, os.ErrDeadlineExceeded) || len(b) > 0 && !strings.HasPrefix(string(b), "HTTP/1.1 400 ") {
			t.Errorf("slow client %d: %q, %v, want its connection cut", i, b, err)
		}
	}
}

// trickle writes text a byte at a time, ten a second.
func trickle(w io.Writer, text string, stop chan struct{}) {
	pace := time.NewTicker(100 * time.Millisecond)
	defer pace.Stop()
	for i := range len(text) {
		if _, err := io.WriteString(w, text[i:i+1]); err != nil {
			return
		}
		select {
		case <-pace.C:
		case <-stop:
			return
		}
	}
}

// sortedQuantile is quantile of samples in any order.
func sortedQuantile(took []time.Duration, q float64) time.Duration {
	slices.Sort(took)
	return quantile(took, q)
}

// TestPlacesComeBack: a key that is taken away and given back has the places of what it held.
func TestPlacesComeBack(t *testing.T) {
	t.Parallel()
	const key = "cm_test_places_Qm4xZs8vUc1eRt"
	held := addKey(key, "Holder", "reader")
	c := startCluster(t, 1, limits("MaxStreamsPerKey", 2), held)
	n := c.nodes[0]
	n.put(t, "app", "k", "v")
	begin := func() (*pending, int) {
		p := newPending(t, n)
		p.conn.SetDeadline(time.Now().Add(limit(10 * time.Second)))
		fmt.Fprintf(p.conn, "GET /api/v1/audit/app HTTP/1.1\r\nHost: t\r\nX-API-Key: %s\r\nAccept: text/event-stream\r\n\r\n", key)
		resp, err := http.ReadResponse(p.r, nil)
		if err != nil {
			t.Fatal(err)
		}
		return p, resp.StatusCode
	}
	for round := range 2 {
		var open []*pending
		for _, want := range []int{http.StatusOK, http.StatusOK, http.StatusTooManyRequests} {
			p, status := begin()
			if status != want {
				t.Errorf("round %d: with %d streams open one more is answered %d, want %d", round, len(open), status, want)
			}
			if status == http.StatusOK {
				open = append(open, p)
			}
		}
		c.configure(dropKey("Holder"))
		n.reload()
		for _, p := range open {
			if _, err := io.Copy(io.Discard, p.r); err != nil { // until its end
				t.Error(err)
			}
		}
		c.configure(held)
		n.reload()
	}
}

// TestQuietStrangers: neither an expired key nor requests that are slow on purpose write more lines
// than an address has.
func TestQuietStrangers(t *testing.T) {
	t.Parallel()
	const key = "cm_test_expired_Qm4xZs8vUc1eRt"
	c := startCluster(t, 1, addKey(key, "Past", "reader", "NotAfter", "2020-01-01T00:00:00Z"), limits("AuthFailuresPerMinute", 100))
	n := c.nodes[0]
	for range 300 {
		if a, err := do("GET", n.url+"/api/v1/namespaces", key, ""); err != nil || a.status != http.StatusUnauthorized && a.status != http.StatusTooManyRequests {
			t.Fatalf("an expired key: %v, %v", a, err)
		}
	}
	var slow sync.WaitGroup
	for range 100 {
		slow.Go(func() {
			p := newPending(t, n)
			defer p.conn.Close()
			io.WriteString(p.conn, "GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
			time.Sleep(150 * time.Millisecond) // the fault's length
			io.WriteString(p.conn, "x")
			if a, err := p.answer(); err != nil || a.status != http.StatusOK {
				t.Errorf("slow: %v, %v", a, err)
			}
		})
	}
	slow.Wait()
	if lines := strings.Count(n.logged(), "msg=request"); lines > 2*addressLines { // a minute may end between
		t.Errorf("strangers at one address wrote %d lines; a minute has %d", lines, addressLines)
	}
}
