package main

// What the log says: of each request one line, at the level that an operator can act on, and
// of raft what raft says.

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
)

// TestRequestLog: each request is one line that says who asked for what and what came of it:
// writes, refusals and what took more than 100 ms at Info, other reads at Debug.
func TestRequestLog(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) { // so that a request takes no time but what it waits for
		w := newWriter(t, dir)
		w.apply(set("app", "k", "v"))
		s := newReader(t, w)
		s.setKeys([]apiKey{{Key: adminKey, Principal: "ops@test", Role: "admin"}, {Key: readerKey, Name: "Service", Role: "reader"}})
		var logged strings.Builder
		s.log = slog.New(slog.NewJSONHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug}))
		const entry = "/api/v1/config/{ns}/{key...}"
		check := func(name, level, method, route, principal string, status int, took time.Duration, revision uint64) {
			t.Helper()
			var got map[string]any
			if err := json.Unmarshal([]byte(logged.String()), &got); err != nil {
				t.Errorf("%s: not one line: %v in %q", name, err, logged.String())
			}
			for _, other := range []string{"time", "source", "error"} {
				delete(got, other)
			}
			want := map[string]any{
				"level": level, "msg": "request", "method": method, "route": route, "status": float64(status), "duration": float64(took),
				"correlationId": "id-of-" + method, "principal": principal, "revision": float64(revision),
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +logged):\n%s", name, diff)
			}
			logged.Reset()
		}
		for _, m := range []struct {
			name, method, path, key string
			takes                   time.Duration // until the revision that it asks for is there
			level, route, principal string
			status                  int
		}{
			{"a read", "GET", keyPath("app", "k") + "?stale", adminKey, 0, "DEBUG", entry, "ops@test", 200},
			{"a reader's read", "HEAD", keyPath("app", "k") + "?stale", readerKey, 0, "DEBUG", entry, "Service", 200},
			{"a list", "GET", "/api/v1/namespaces?stale", readerKey, 0, "DEBUG", "/api/v1/namespaces", "Service", 200},
			{"without a key", "GET", "/health", "", 0, "DEBUG", "/health", "", 200},
			{"a read that takes 100 ms", "GET", keyPath("app", "k") + "?stale", readerKey, 100 * time.Millisecond, "DEBUG", entry, "Service", 200},
			{"a slow read", "GET", keyPath("app", "k") + "?stale", readerKey, 101 * time.Millisecond, "INFO", entry, "Service", 200},
			{"what is missing", "GET", keyPath("app", "missing") + "?stale", readerKey, 0, "INFO", entry, "Service", 404},
			{"a parameter that is not known", "GET", keyPath("app", "k") + "?stle", readerKey, 0, "INFO", entry, "Service", 400},
			{"no key", "GET", keyPath("app", "k"), "", 0, "INFO", entry, "", 401},
			{"a reader's write", "PUT", keyPath("app", "k"), readerKey, 0, "INFO", entry, "Service", 403},
			{"a write without a leader", "PUT", keyPath("app", "k"), adminKey, 0, "INFO", entry, "ops@test", 503},
			{"no route", "GET", "/nowhere", adminKey, 0, "INFO", "none", "", 404},
			{"no path", "GET", "/api/v1/config/app//k", adminKey, 0, "INFO", "none", "", 400},
		} {
			r := httptest.NewRequest(m.method, m.path, nil)
			r.Header.Set("X-Correlation-Id", "id-of-"+m.method)
			if m.key != "" {
				r.Header.Set("X-API-Key", m.key)
			}
			rev := w.st.at().rev
			if m.takes > 0 {
				rev++
				r.Header.Set("Confman-Min-Revision", strconv.FormatUint(rev, 10))
				go func() {
					time.Sleep(m.takes)
					w.apply(set("app", "k", m.name))
				}()
			}
			if !strings.HasPrefix(m.path, "/api/") {
				rev = 0
			}
			s.ServeHTTP(httptest.NewRecorder(), r)
			check(m.name, m.level, m.method, m.route, m.principal, m.status, m.takes, rev)
		}

		// Nobody leads here, so what a write that goes well comes to is said by hand.
		r := httptest.NewRequest("PUT", keyPath("app", "k"), nil)
		r.Header.Set("X-Correlation-Id", "id-of-PUT")
		c := s.newCall(httptest.NewRecorder(), r)
		for rt := range s.tallies {
			if rt != nil && rt.method == "PUT" && rt.pattern == entry {
				c.route = rt
			}
		}
		c.who = caller{principal: "ops@test", role: admin}
		c.sawRevision(7)
		c.w.WriteHeader(http.StatusCreated)
		c.finish(nil)
		check("a write", "INFO", "PUT", entry, "ops@test", 201, 0, 7)
	})
}

// TestRaftLog: what raft says comes out at the level at which raft says it, and as it would
// have printed it itself.
func TestRaftLog(t *testing.T) {
	t.Parallel()
	var logged strings.Builder
	l := &raftLogger{Logger: hclog.NewNullLogger(), log: slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{
		Level: slog.LevelDebug,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))}
	for _, m := range []struct {
		level hclog.Level
		say   func(l hclog.Logger, msg string, args ...any)
		want  string
	}{
		{hclog.Trace, hclog.Logger.Trace, "DEBUG"},
		{hclog.Debug, hclog.Logger.Debug, "DEBUG"},
		{hclog.Info, hclog.Logger.Info, "INFO"},
		{hclog.Warn, hclog.Logger.Warn, "WARN"},
		{hclog.Error, hclog.Logger.Error, "ERROR"},
	} {
		m.say(l, "one", "entries", hclog.Fmt("%d of %d", 3, 7), "error", io.EOF)
		m.say(l.Named("net").With("peer", "node2"), "two")
		l.Log(m.level, "three")
		want := "level=" + m.want + ` msg="raft: one" entries="3 of 7" error=EOF` + "\n" +
			"level=" + m.want + ` msg="raft: two" peer=node2` + "\n" +
			"level=" + m.want + ` msg="raft: three"` + "\n"
		if diff := cmp.Diff(want, logged.String()); diff != "" {
			t.Errorf("%v (-want +logged):\n%s", m.level, diff)
		}
		logged.Reset()
	}
}
