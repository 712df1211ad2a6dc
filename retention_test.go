package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"
)

// ask asks the server in this process. Of an answer that is a problem only status and slug are returned:
// others have an id of their own. A stream is what there is to send at this moment.
func ask(tb testing.TB, s *server, path string, headers ...string) string {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if slices.Contains(headers, "text/event-stream") {
		cancel() // a stream sends what there is, and then looks whether its client is there
	}
	r := httptest.NewRequestWithContext(ctx, "GET", path, nil)
	r.Header.Set("X-API-Key", adminKey)
	for pair := range slices.Chunk(headers, 2) {
		r.Header.Set(pair[0], pair[1])
	}
	rec := httptest.NewRecorder()
	func() {
		defer func() {
			if p := recover(); p != nil && p != http.ErrAbortHandler {
				panic(p)
			}
		}()
		s.ServeHTTP(rec, r)
	}()
	if strings.HasPrefix(rec.Header().Get("Content-Type"), "application/problem") {
		return fmt.Sprint(rec.Code, " ", (&answer{body: rec.Body.Bytes()}).slug())
	}
	return fmt.Sprint(rec.Code, " ", rec.Header().Get("Etag"), " ", rec.Body)
}

// patch makes the command that sets keys with these numbers.
func patch(ns string, from, to int) *command {
	c := &command{Op: "patch", NS: ns, Actor: "ops@test"}
	for k := from; k < to; k++ {
		v := fmt.Sprint("value ", k, " ", strings.Repeat("x", 80))
		c.Changes = append(c.Changes, change{Key: fmt.Sprintf("k%06d", k), Value: &v, Type: "string"})
	}
	return c
}

// trimOf makes the command that trims the trail of a writer's store up to a revision, as a leader counts
// what goes.
func (w *writer) trimOf(rev uint64) *command {
	w.tb.Helper()
	t := &trimming{Rev: rev, After: w.st.at().cut.at.rev}
	err := w.st.view(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("trail")).ForEach(func(k, _ []byte) error {
			if at := placeAt(k).rev; t.After < at && at <= rev {
				t.Events++
			}
			return nil
		})
	})
	if err != nil {
		w.tb.Fatal(err)
	}
	return &command{Op: "trim", Trim: t, Actor: "confman", ID: "of-a-trim"}
}

// left counts the records of the trail, trimmed or not.
func (w *writer) left() (n int) {
	err := w.st.view(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("trail")).ForEach(func(_, _ []byte) error { n++; return nil })
	})
	if err != nil {
		w.tb.Fatal(err)
	}
	return n
}

// sweepAll sweeps as a leader does and returns how many commands it took.
func (w *writer) sweepAll() (sweeps int) {
	w.tb.Helper()
	for {
		last, err := w.st.sweepable()
		if err != nil {
			w.tb.Fatal(err)
		}
		if last.rev == 0 {
			return sweeps
		}
		before := *w.st.at()
		if res := w.apply(&command{Op: "sweep", Trim: &trimming{Rev: last.rev, N: last.n}}); res[0].changed == 0 {
			w.tb.Fatalf("a sweep up to %v deletes nothing", last)
		}
		before.index++
		if *w.st.at() != before {
			w.tb.Fatalf("a sweep moved the store from %+v to %+v", before, *w.st.at())
		}
		sweeps++
	}
}

// TestTrim: what was trimmed is not there for any reader, from the trim on and whatever is left of its
// bytes; what is kept is what it was.
func TestTrim(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := newWriter(t, dir)
	s := newReader(t, w)
	w.apply(set("gone", "k", "v"), unset("gone", "k"), set("quiet", "k", "v")) // 1 to 3
	w.apply(&command{Op: "drop", NS: "gone", Actor: "ops@test"})               // 4
	w.apply(patch("app", 0, 600), patch("app", 100, 105))                      // 5 and, for nothing changes, 5 still
	for v := range 20 {
		w.apply(set("app", "k", fmt.Sprint(v))) // 6 to 25
	}
	w.apply(patch("other", 0, 3), set("app", "after", "v")) // 26, 27
	const last, events = 27, 4 + 600 + 20 + 3 + 1
	if at := w.st.at(); at.rev != last || at.events != events {
		t.Fatalf("the store is at %+v", at)
	}
	const through = 10
	items := func(of string) (all []string) {
		var page struct{ Items []json.RawMessage }
		_, text, _ := strings.Cut(of, "  ")
		if err := json.Unmarshal([]byte(text), &page); err != nil {
			t.Fatalf("%v in %.300s", err, of)
		}
		for _, i := range page.Items {
			all = append(all, string(i))
		}
		return all
	}
	old := items(ask(t, s, "/api/v1/audit?stale&limit=1000"))
	oldApp := items(ask(t, s, "/api/v1/audit/app?stale&limit=1000"))
	cursorAt := func(ns, query string) string { // of a page whose next item is of the trimmed part
		var page struct{ Pagination struct{ NextCursor string } }
		said := ask(t, s, "/api/v1/audit"+ns+"?stale"+query)
		_, text, _ := strings.Cut(said, "  ")
		if err := json.Unmarshal([]byte(text), &page); err != nil || page.Pagination.NextCursor == "" {
			t.Fatalf("no cursor: %.300s", said)
		}
		return page.Pagination.NextCursor
	}
	// The newest 25 events are of revisions 27, 26 (three) and 25 down to 5; of app 21 are of 27 and 25 to 6.
	deep, deepApp := cursorAt("", "&limit=24"), cursorAt("/app", "&limit=21")
	high := cursorAt("", "&limit=10")
	hashes := map[uint64][32]byte{}
	for rev := uint64(1); rev <= last; rev++ {
		h, ok, err := w.st.hashAt(rev)
		if err != nil || !ok {
			t.Fatalf("hash of %d: %t, %v", rev, ok, err)
		}
		hashes[rev] = h
	}

	res := w.apply(w.trimOf(through))[0]
	if at := w.st.at(); res.err != nil || res.rev != last+1 || at.rev != last+1 || at.events != events-608-1+1 || at.cut.at != (place{through, 0}) {
		t.Fatalf("%+v, the store is at %+v", res, at)
	}
	// Others, for another cut or none that is new, change nothing.
	at := *w.st.at()
	for _, no := range []*trimming{{Rev: 12, Events: 1}, {Rev: through, After: through}, {Rev: 5, After: through}, {Rev: last + 9, After: through}, {Rev: 12, After: through, Events: 1000}} {
		if res := w.apply(&command{Op: "trim", Trim: no})[0]; res.err != nil || res.rev != at.rev {
			t.Errorf("trim %+v: %+v", no, res)
		}
		at.index++
	}
	if *w.st.at() != at {
		t.Errorf("the store moved from %+v to %+v", at, *w.st.at())
	}
	// The trim's event names what was trimmed.
	h := hashes[through]
	now := items(ask(t, s, "/api/v1/audit?stale&limit=1000"))
	var ev eventDoc
	if err := json.Unmarshal([]byte(now[0]), &ev); err != nil {
		t.Fatal(err)
	}
	said := fmt.Sprintf(`{"through":10,"events":609,"hash":"%x"}`, h)
	if ev.Action != "audit.trim" || ev.Actor != "confman" || ev.Namespace != "" || ev.Key != "" || ev.Type != "json" || ev.OldValue != nil || *ev.NewValue != said || ev.CorrelationID != "of-a-trim" {
		t.Errorf("the event of a trim is %s, want %s in it", now[0], said)
	}

	stages := []string{"at once", "swept in part", "swept", "opened again", "restored from a snapshot"}
	for _, stage := range stages {
		switch stage {
		case "swept in part":
			w.apply(&command{Op: "sweep", Trim: &trimming{Rev: 5, N: 300}})
			if n := w.left(); n != events+1-4-301 {
				t.Errorf("%d records are left", n)
			}
		case "swept":
			// No sweep goes beyond the cut, whatever it says.
			if w.apply(&command{Op: "sweep", Trim: &trimming{Rev: last}}); w.left() != int(at.events) {
				t.Errorf("%d records are left, want %d", w.left(), at.events)
			}
		case "opened again":
			if err := w.st.Close(); err != nil {
				t.Fatal(err)
			}
			was := w.index
			w = newWriter(t, dir)
			if w.index != was {
				t.Fatalf("it opens at %d, want %d", w.index, was)
			}
		case "restored from a snapshot":
			snap := snapshotOf(t, w.st)
			w = newWriter(t, t.TempDir())
			if err := newMachine(t, w.st).Restore(io.NopCloser(snap)); err != nil {
				t.Fatal(err)
			}
			w.index, w.now = w.st.at().index, w.st.at().nanos
		}
		s = newReader(t, w)
		got := *w.st.at()
		if got.index = at.index; got != at {
			t.Errorf("%s: the store is at %+v, want %+v", stage, got, at)
		}
		// All that is listed, followed and verified.
		list := func(path string, want []string) {
			t.Helper()
			if diff := gocmp.Diff(want, items(ask(t, s, path))); diff != "" {
				t.Errorf("%s: %s (-want +got):\n%s", stage, path, diff)
			}
		}
		kept := append([]string{now[0]}, old[:4+15]...)
		list("/api/v1/audit?stale&limit=1000", kept)
		list("/api/v1/audit?stale&since=3", kept)
		list("/api/v1/audit/app?stale&limit=1000", oldApp[:16])
		list("/api/v1/audit/app?stale&key=k&since=23", oldApp[1:3])
		list("/api/v1/audit/gone?stale", nil)
		list("/api/v1/audit/quiet?stale", nil)
		list("/api/v1/audit?stale&cursor="+high, old[10:19])
		follow := func(ns, query, id string, want []string) {
			t.Helper()
			headers := []string{"Accept", "text/event-stream"}
			if id != "" {
				headers = append(headers, "Last-Event-ID", id)
			}
			said := ask(t, s, "/api/v1/audit"+ns+"?stale"+query, headers...)
			var got []string
			for line := range strings.Lines(said) {
				if data, ok := strings.CutPrefix(line, "data: "); ok {
					got = append(got, strings.TrimSuffix(data, "\n"))
				}
			}
			slices.Reverse(got)
			if diff := gocmp.Diff(want, got); diff != "" || !strings.HasPrefix(said, "200 ") {
				t.Errorf("%s: stream %s%s %s says %.100q (-want +got):\n%s", stage, ns, query, id, said, diff)
			}
		}
		follow("", "&since=10", "", kept)
		follow("", "", "10-0", kept)
		follow("", "", "11-0", kept[:len(kept)-1])
		follow("/app", "&since=10", "", oldApp[:16])
		follow("/app", "", "10-0", oldApp[:16])
		// Of these nothing was trimmed that the client has not seen.
		follow("/other", "&since=0", "", old[1:4])
		follow("/other", "", "26-0", old[1:3])
		follow("/quiet", "&since=3", "", nil)
		follow("/gone", "", "4-0", nil)
		stream := []string{"Accept", "text/event-stream"}
		for _, q := range []struct {
			path    string
			headers []string
			want    string
		}{
			{"/api/v1/audit?stale&since=9", stream, "410 gone"},
			{"/api/v1/audit?stale&since=0", stream, "410 gone"},
			{"/api/v1/audit?stale", append([]string{"Last-Event-ID", "9-0"}, stream...), "410 gone"},
			{"/api/v1/audit/app?stale", append([]string{"Last-Event-ID", "9-0"}, stream...), "410 gone"},
			{"/api/v1/audit/quiet?stale&since=2", stream, "410 gone"},
			{"/api/v1/audit/gone?stale", append([]string{"Last-Event-ID", "2-0"}, stream...), "410 gone"},
			{"/api/v1/audit/never?stale", stream, "404 not-found"},
			{"/api/v1/audit/never?stale", nil, "404 not-found"},
			{"/api/v1/audit?stale&cursor=" + deep, nil, "410 gone"},
			{"/api/v1/audit/app?stale&cursor=" + deepApp, nil, "410 gone"},
			{"/api/v1/verify?stale&from=10", nil, "410 gone"},
			{"/api/v1/verify?stale&from=1&to=3", nil, "410 gone"},
			{"/api/v1/verify?stale&to=10", nil, "410 gone"},
			{"/api/v1/verify?stale", nil, fmt.Sprintf(`200  {"ok":true,"events":20,"first":"11-0","last":"28-0","hash":"%x"}`+"\n", at.hash)},
			{"/api/v1/verify?stale&from=11&to=12", nil, fmt.Sprintf(`200  {"ok":true,"events":2,"first":"11-0","last":"12-0","hash":"%x"}`+"\n", hashes[12])},
			{"/api/v1/verify?stale&from=28", nil, fmt.Sprintf(`200  {"ok":true,"events":1,"first":"28-0","last":"28-0","hash":"%x"}`+"\n", at.hash)},
			{keyPath("app", "k") + "?stale&version=5", nil, "410 gone"},
			{keyPath("app", "k") + "?stale&version=1", nil, "410 gone"},
			{keyPath("app", "k") + "?stale&version=6&raw", nil, `200 "11" 5`},
			{keyPath("quiet", "k") + "?stale&version=1&raw", nil, `200 "3" v`},
			{keyPath("app", "k") + "?stale&version=21", nil, "404 not-found"},
		} {
			if got := ask(t, s, q.path, q.headers...); got != q.want {
				t.Errorf("%s: %s %q: %.300s, want %s", stage, q.path, q.headers, got, q.want)
			}
		}
		// Streams that are open, and have come so far.
		for _, m := range []struct {
			ns   string
			pos  place
			want error
		}{{"", place{9, 0}, errGone}, {"app", place{9, 0}, errGone}, {"", place{10, 0}, nil}, {"quiet", place{9, 0}, nil}, {"other", place{9, 0}, nil}} {
			var buf []byte
			pos, more, err := s.collect(m.ns, m.pos, nil, &buf)
			if !errors.Is(err, m.want) || err == nil && (more || pos.rev != at.rev) {
				t.Errorf("%s: a stream of %q at %v: %v, comes to %v, more %t", stage, m.ns, m.pos, err, pos, more)
			}
		}
		for rev := uint64(1); rev <= last; rev++ {
			h, ok, err := w.st.hashAt(rev)
			if ok != (rev >= through) || err != nil || ok && h != hashes[rev] {
				t.Errorf("%s: hash of %d: %x, %t, %v", stage, rev, h, ok, err)
			}
		}
		// Apply sees it no other way: who changed the namespace is not known any more.
		no := w.apply(&command{Op: "describe", NS: "quiet", Meta: &nsMeta{}, If: condition{hasMatch: true, match: []uint64{1}}})[0]
		at.index++
		if p := problemOf(no.err); p.kind != errPrecondition || *p.current != (current{Revision: 3}) {
			t.Errorf("%s: a condition finds %+v", stage, p.current)
		}
	}
	// Behind it the store goes on, and everything can go but the event that says so.
	w.apply(set("quiet", "k", "w"))
	if said := ask(t, newReader(t, w), "/api/v1/audit/quiet?stale"); len(items(said)) != 1 {
		t.Errorf("the next event of a namespace without events: %s", said)
	}
	w.apply(w.trimOf(w.st.at().rev))
	w.sweepAll()
	if said := ask(t, newReader(t, w), "/api/v1/verify?stale"); w.left() != 1 || w.st.at().events != 1 || !strings.Contains(said, `"ok":true,"events":1,"first":"30-0","last":"30-0"`) {
		t.Errorf("%d records are left: %s", w.left(), said)
	}
}

// TestVerifyOvertaken: a verification that the cut overtakes checks what is kept, from the cut on; one that
// was asked for more says that it is gone.
func TestVerifyOvertaken(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	for k := range 6 {
		w.apply(patch("app", k*streamScan/5, (k+1)*streamScan/5), set("app", "k", fmt.Sprint(k)))
	}
	v, all := &verification{OK: true}, &verification{OK: true}
	pos, prev := place{}, [32]byte{}
	posAll, prevAll := endOf(1), [32]byte{}
	step := func() (more, moreAll bool, err error) {
		var asked error
		err = w.st.view(func(tx *bbolt.Tx) (err error) {
			moreAll, asked = all.check(tx, &posAll, &prevAll, 2, 1<<63)
			more, err = v.check(tx, &pos, &prev, 0, 1<<63)
			return err
		})
		return more, asked == nil, errors.Join(err, asked)
	}
	if more, _, err := step(); !more || err != nil || v.Events != streamScan || !v.OK {
		t.Fatalf("%t, %v, %+v", more, err, v)
	}
	w.apply(w.trimOf(11))
	more, going, err := step()
	if more || going || !errors.Is(err, errGone) {
		t.Errorf("%t, %t, %v", more, going, err)
	}
	at := w.st.at()
	if want := (verification{OK: true, Events: at.events, First: "12-0", Last: "13-0", Hash: hex.EncodeToString(at.hash[:])}); *v != want {
		t.Errorf("%+v, want %+v", *v, want)
	}
}

// TestTrimReplicas: two machines with one log of random commands, trims and sweeps come to the same, however
// the log reaches them.
func TestTrimReplicas(t *testing.T) {
	t.Parallel()
	r := seeded(t)
	w := newWriter(t, t.TempDir())
	a := &author{r, w}
	one, other := newMachine(t, w.st), newMachine(t, newWriter(t, t.TempDir()).st)
	var kept []byte
	trims, swept, restored := 0, 0, 0
	for range rounds(150, 3000) {
		var cmds []*command
		for range 1 + r.IntN(10) {
			cmds = append(cmds, a.command())
		}
		pos := *w.st.at()
		switch {
		case r.IntN(4) == 0 && pos.rev > pos.cut.at.rev:
			cmds = append(cmds, w.trimOf(pos.cut.at.rev+r.Uint64N(pos.rev-pos.cut.at.rev)+1), set("app", "k", fmt.Sprint(r.Int())))
		case r.IntN(2) == 0 && pos.cut.at.rev > 0:
			cmds = append(cmds, &command{Op: "sweep", Trim: &trimming{Rev: r.Uint64N(pos.cut.at.rev + 3), N: uint16(r.IntN(3))}})
		}
		logs := w.entries(cmds...)
		before := w.left()
		one.apply(t, logs)
		if w.st.at().cut != pos.cut {
			trims++
		}
		swept = max(swept, before-w.left())
		for len(logs) > 0 {
			n := 1 + r.IntN(len(logs))
			other.apply(t, logs[:n])
			logs = logs[n:]
		}
		if r.IntN(20) == 0 {
			kept = bytes.Clone(snapshotOf(t, other.store).Bytes())
			if err := other.Restore(io.NopCloser(bytes.NewReader(kept))); err != nil {
				t.Fatal(err)
			}
			restored++
		}
		if *other.store.at() != *w.st.at() {
			t.Fatalf("positions %+v and %+v", *w.st.at(), *other.store.at())
		}
	}
	if trims < 10 || swept == 0 || restored == 0 {
		t.Errorf("%d trims, at most %d events swept at once, %d snapshots restored", trims, swept, restored)
	}
	if diff := gocmp.Diff(one.said, other.said); diff != "" {
		t.Errorf("answers (-one +other):\n%s", diff)
	}
	err := w.st.view(func(ta *bbolt.Tx) error {
		return other.store.view(func(tb *bbolt.Tx) error {
			if n := countEvents(tb, w.st.at().cut.at); n != w.st.at().events {
				return fmt.Errorf("%d events are kept, %d counted", n, w.st.at().events)
			}
			return cmp.Or(checkEntries(tb), checkTail(tb, other.store.at()), diffBuckets("", ta, tb))
		})
	})
	if err != nil {
		t.Error(err)
	}
	at := w.st.at()
	for _, st := range []*store{w.st, other.store} {
		said := ask(t, newReader(t, &writer{st: st}), "/api/v1/verify?stale")
		want := fmt.Sprintf(`200  {"ok":true,"events":%d,"first":"%d-0","last":"%d-`, at.events, at.cut.at.rev+1, at.rev)
		if !strings.HasPrefix(said, want) || !strings.HasSuffix(said, hex.EncodeToString(at.hash[:])+"\"}\n") {
			t.Errorf("%s, want %s... and hash %x", said, want, at.hash)
		}
	}
}

// TestTrimmable: how much a leader takes off.
func TestTrimmable(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	began := w.now
	second := func(n int) int64 { return began + int64(n)*int64(time.Second) }
	// Revision r is r seconds after began. Of revision 3 there are a thousand events, else one.
	w.apply(set("app", "k", "1"), set("app", "k", "2"), patch("app", 0, 1000))
	for v := range 997 {
		w.apply(set("app", "k", fmt.Sprint(v)))
	}
	look := func(excess uint64, horizon int64) string {
		t.Helper()
		got, err := w.st.trimmable(t.Context(), w.st.at().cut, excess, horizon)
		if err != nil {
			t.Fatal(err)
		}
		if got == nil {
			return "nothing"
		}
		return fmt.Sprintf("%d events up to %d behind %d", got.Events, got.Rev, got.After)
	}
	hour := int(trimLate / time.Second)
	for _, m := range []struct {
		excess  uint64
		horizon int64
		want    string
	}{
		{0, 0, "nothing"},
		{1, 0, "1 events up to 1 behind 0"},
		{2, 0, "2 events up to 2 behind 0"},
		{1001, 0, "2 events up to 2 behind 0"}, // a revision goes whole
		{1002, 0, "1002 events up to 3 behind 0"},
		{1003, 0, "1003 events up to 4 behind 0"},
		{10_000, 0, "1999 events up to 1000 behind 0"},
		{0, second(1), "nothing"},                      // it is not older
		{0, second(3), "nothing"},                      // too few
		{0, second(4), "1002 events up to 3 behind 0"}, // enough
		{0, second(2) + 1, "nothing"},                  // too few, and
		{0, second(hour + 1), "1999 events up to 1000 behind 0"},
		{2, second(4), "1002 events up to 3 behind 0"}, // whichever is more
		{1003, second(2), "1003 events up to 4 behind 0"},
	} {
		if got := look(m.excess, m.horizon); got != m.want {
			t.Errorf("excess %d, horizon %v: %s, want %s", m.excess, time.Duration(m.horizon-began), got, m.want)
		}
	}
	// Few that are too old go when the first has been so for an hour.
	w.apply(w.trimOf(998)) // 1001, at second 1001
	for _, m := range []struct {
		horizon int
		want    string
	}{{1000, "nothing"}, {999 + hour, "nothing"}, {999 + hour + 1, "3 events up to 1001 behind 998"}} {
		if got := look(0, second(m.horizon)); got != m.want {
			t.Errorf("horizon at second %d: %s, want %s", m.horizon, got, m.want)
		}
	}
	// But trims alone do not.
	w.apply(w.trimOf(1001))
	if got := look(0, second(10*hour)); got != "nothing" {
		t.Errorf("of a trim: %s", got)
	}
	w.apply(set("app", "k", "after"))
	if got := look(0, second(10*hour)); got != "2 events up to 1003 behind 1001" {
		t.Errorf("of a trim and a change: %s", got)
	}
	// One that was found goes off.
	got, err := w.st.trimmable(t.Context(), w.st.at().cut, 1, 0)
	if err != nil || got != nil {
		t.Errorf("the oldest event, of a trim: %+v, %v", got, err)
	}
	got, err = w.st.trimmable(t.Context(), w.st.at().cut, 2, 0)
	if err != nil || got == nil || w.apply(&command{Op: "trim", Trim: got})[0].rev != 1004 || w.st.at().events != 1 {
		t.Errorf("%+v, %v; the store is at %+v", got, err, w.st.at())
	}
}

// TestSweepFreesPages: a trail that is trimmed and swept while it grows makes no larger file.
func TestSweepFreesPages(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	size := func() int64 {
		fi, err := os.Stat(w.st.path())
		if err != nil {
			t.Fatal(err)
		}
		return fi.Size()
	}
	const keys, each = 3000, 100
	grow := func(round int) {
		for k := 0; k < keys; k += each {
			c := patch("app", k, k+each)
			for i := range c.Changes {
				v := fmt.Sprint(round, *c.Changes[i].Value)
				c.Changes[i].Value = &v
			}
			w.apply(c)
		}
	}
	grow(0)
	empty := size()
	var was int64
	for round := 1; round <= 6; round++ {
		grow(round)
		w.apply(w.trimOf(w.st.at().rev))
		if n := w.sweepAll(); n < keys/sweepEvents || n > 2*keys/sweepEvents {
			t.Errorf("%d sweeps", n)
		}
		t.Logf("round %d: %d bytes", round, size())
		if round == 2 {
			was = size()
		}
	}
	if spare := w.st.spare.Load(); spare < 1<<20 || spare > 4<<20 {
		t.Errorf("%d bytes are said to be free", spare)
	}
	if now := size(); now > was+was/10 || was < empty {
		t.Errorf("the file had %d bytes after two rounds and has %d after six", was, now)
	}
	grow(7)
	if grow(8); w.st.spare.Load() != 0 {
		t.Errorf("%d bytes are said to be free when they are used again", w.st.spare.Load())
	}
	// Large values: few in one sweep.
	large := strings.Repeat("x", 300_000)
	for i := range 8 {
		w.apply(set("app", "large", large+fmt.Sprint(i)))
	}
	w.apply(w.trimOf(w.st.at().rev))
	if n := w.sweepAll(); n < 4 {
		t.Errorf("%d sweeps of 4.5 MB", n)
	}
}

// TestTrimDamage: what is lost behind the cut is noticed, and so is a cut that is lost.
func TestTrimDamage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := newWriter(t, dir)
	for v := range 30 {
		w.apply(set("app", "k", fmt.Sprint(v)))
	}
	w.apply(w.trimOf(10))
	w.apply(&command{Op: "sweep", Trim: &trimming{Rev: 5}})
	if err := w.st.Close(); err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct {
		name   string
		damage func(tx *bbolt.Tx) error
		start  bool // the node starts
		ok     string
	}{
		{"the first event that is kept is gone", func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte("trail")).Delete(place{11, 0}.appendTo(nil))
		}, false, ""},
		{"the cut is gone", func(tx *bbolt.Tx) error { return tx.Bucket([]byte("meta")).Delete([]byte("cut")) }, false, ""},
		{"the format says that there is none", func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte("meta")).Put([]byte("format"), []byte{0, 0, 0, 1})
		}, false, ""},
		{"the cut's hash is another", func(tx *bbolt.Tx) error {
			k := []byte("cut")
			rec := bytes.Clone(tx.Bucket([]byte("meta")).Get(k))
			rec[20] ^= 1
			return tx.Bucket([]byte("meta")).Put(k, seal(k, rec))
		}, false, ""},
		{"a trimmed event is damaged", func(tx *bbolt.Tx) error {
			k := place{8, 0}.appendTo(nil)
			rec := bytes.Clone(tx.Bucket([]byte("trail")).Get(k))
			rec[20] ^= 1
			return tx.Bucket([]byte("trail")).Put(k, rec)
		}, true, ""},
		{"the count is another program's", func(tx *bbolt.Tx) error { return tx.Bucket([]byte("meta")).Delete([]byte("events")) }, true, ""},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "state.db")
		for name, text := range map[string][]byte{"state.db": file, "state.mark": []byte("clean\n")} {
			if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		db, err := bbolt.Open(path, 0o600, nil)
		if err == nil {
			err = cmp.Or(db.Update(m.damage), db.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		st, _, err := openStore(dir)
		if !m.start {
			if !errors.Is(err, errCorrupt) {
				t.Errorf("%s: %v", m.name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", m.name, err)
			continue
		}
		w := &writer{tb: t, st: st, index: st.at().index, now: st.at().nanos}
		if said := ask(t, newReader(t, w), "/api/v1/verify?stale"); !strings.Contains(said, `"ok":true,"events":21,"first":"11-0"`) || st.at().events != 21 {
			t.Errorf("%s: %s; %d events", m.name, said, st.at().events)
		}
		w.sweepAll()
		// And what goes while it runs.
		if err := st.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket([]byte("trail")).Delete(place{11, 0}.appendTo(nil)) }); err != nil {
			t.Fatal(err)
		}
		s := newReader(t, w)
		s.node.failed = make(chan error, 10)
		for path, want := range map[string]string{"/api/v1/verify": `200  {"ok":false`, "/api/v1/audit": "500 internal", "/api/v1/audit/app": "500 internal", keyPath("app", "k"): "500 internal"} {
			if path == keyPath("app", "k") {
				path += "?version=11&stale"
			} else {
				path += "?stale&limit=1000"
			}
			path = strings.Replace(path, "verify?stale&limit=1000", "verify?stale", 1)
			if said := ask(t, s, path); !strings.HasPrefix(said, want) {
				t.Errorf("%s: %s of a trail without its first event: %.200s, want %s", m.name, path, said, want)
			}
		}
		if err := st.db.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAuditMistakes: limits of the trail that make no sense end the program with a line that names them.
func TestAuditMistakes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{"KeepDays": -1}`:                              "Audit.KeepDays: -1 must be 0 to 36500",
		`{"KeepDays": 36501}`:                           "Audit.KeepDays",
		`{"KeepEvents": -5}`:                            "Audit.KeepEvents: -5 must be 0 to",
		`{"KeepEvents": 1000000000001}`:                 "Audit.KeepEvents",
		`{"KeepEvents": 1.5}`:                           "Audit.KeepEvents",
		`{"KeepEvents": null}`:                          "Audit.KeepEvents",
		`{"KeepHours": 1}`:                              "Audit.KeepHours",
		`{"keepdays": 36500, "KEEPEVENTS": 1000000000}`: "",
	} {
		path := filepath.Join(t.TempDir(), "confman.json")
		doc := `{"Cluster": {"NodeId": "a", "Nodes": [{"Id": "a", "Address": "127.0.0.1", "ApiPort": 1, "RaftPort": 2}]},
			"Auth": {"ApiKeys": [{"Key": "k", "Name": "n", "Role": "admin"}]}, "Audit": ` + text + `}`
		if err := os.WriteFile(path, []byte(doc), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := loadConfig(path, "")
		if want == "" && err != nil || want != "" && (err == nil || !errors.Is(err, errUsage) || !strings.Contains(err.Error(), want)) {
			t.Errorf("Audit %s: %v, want %q", text, err, want)
		}
	}
}

// TestRetention trims the trail of a running cluster while others write, and its leader is killed while it
// sweeps. The long run is of a million events, of which a hundredth stays; the short one shows that it
// works.
func TestRetention(t *testing.T) {
	t.Parallel()
	events, keep := rounds(4000, 1_000_000), rounds(500, 10_000)
	million := events == 1_000_000
	const each = 100 // events of a revision
	c := newCluster(t, 3, with("Cluster", "LowerElectionTimeout", rounds(1000, 5000)))
	for _, n := range c.nodes {
		n.env = append(n.env, "CONFMAN_DEBUG=1") // so that they say when they have swept
	}
	retain := func(doc map[string]any) { doc["Audit"] = map[string]any{"KeepEvents": keep} }
	if !million {
		c.configure(retain)
	}
	c.start()
	// send makes ops requests, by four clients that repeat what was not applied, and returns how long each took.
	send := func(ops int, request func(op int) (method, path, body string)) (took []time.Duration) {
		t.Helper()
		var next atomic.Int64
		var mu sync.Mutex // guards took
		var clients errgroup.Group
		n := c.leader()
		for range 4 {
			clients.Go(func() error {
				for op := int(next.Add(1)) - 1; op < ops; op = int(next.Add(1)) - 1 {
					method, path, body := request(op)
					start := time.Now()
					for {
						a, err := doWith(following, method, n.url+path, adminKey, body)
						if err == nil && a.status/100 == 2 {
							break
						}
						if time.Since(start) > limit(time.Minute) || err == nil && a.status != http.StatusServiceUnavailable && a.status != http.StatusGatewayTimeout {
							return fmt.Errorf("%s %s: %v, %v", method, path, a, err)
						}
						time.Sleep(20 * time.Millisecond) // the pace of the question
					}
					mu.Lock()
					took = append(took, time.Since(start))
					mu.Unlock()
				}
				return nil
			})
		}
		if err := clients.Wait(); err != nil {
			t.Fatal(err)
		}
		return took
	}
	revisions := 0
	grow := func(events int) {
		t.Helper()
		first := revisions
		send(events/each, func(op int) (method, path, body string) {
			text := []byte("{")
			for k := range each {
				text = fmt.Appendf(text, `"k%06d":"%0100d",`, ((first+op)*each+k)%100_000, first+op)
			}
			text[len(text)-1] = '}'
			return "PATCH", "/api/v1/config/bench", string(text)
		})
		revisions += events / each
	}
	writes := 0
	write := func(ops int) []time.Duration {
		t.Helper()
		first := writes
		writes += ops
		return send(ops, func(op int) (method, path, body string) {
			return "PUT", keyPath("bench", fmt.Sprint("single", op%100)), fmt.Sprintf(`{"value":"%0100d"}`, first+op)
		})
	}
	shows := func(what string, took []time.Duration) (p99 time.Duration) {
		slices.Sort(took)
		p99 = quantile(took, 0.99)
		t.Logf("%s: %d writes, p50 %v, p99 %v, slowest %v", what, len(took), quantile(took, 0.50), p99, took[len(took)-1])
		return p99
	}
	size := func() (most int64) {
		for _, n := range c.nodes {
			fi, err := os.Stat(filepath.Join(n.data, "state.db"))
			if err != nil {
				t.Fatal(err)
			}
			most = max(most, fi.Size())
		}
		return most
	}
	// level waits until all nodes have what the leader has, however far behind such a load has left them.
	level := func() {
		t.Helper()
		until(t, 2*time.Minute, func() error {
			_, st, err := c.nodes[0].status()
			for _, n := range c.nodes[1:] {
				_, other, oerr := n.status()
				if err = errors.Join(err, oerr); err == nil && other.Revision != st.Revision {
					err = fmt.Errorf("%s is at revision %d, %s at %d", st.Node, st.Revision, other.Node, other.Revision)
				}
			}
			return err
		})
	}
	before := size()
	grow(events)
	level()
	whole := size()
	t.Logf("%d events with values of 100 bytes: state.db has %d bytes, %d an event", events, whole, (whole-before)/int64(events))
	was := shows("before", write(rounds(200, 5000))) // each of these keys has two versions and more

	if million { // the limit comes, as it does to a cluster that runs
		c.configure(retain)
		for _, n := range append(c.followers(), c.leader()) {
			n.stop()
			n.start()
			c.ready()
		}
	}
	said := func(what string) (times int) {
		for _, n := range c.nodes {
			times += strings.Count(n.logged(), what)
		}
		return times
	}
	const trimmed, swept = `msg="audit trail trimmed"`, `msg="audit trail swept"`
	until(t, limit(60*time.Second), func() error {
		if said(trimmed) == 0 {
			return errors.New("nothing was trimmed")
		}
		return nil
	})
	took := write(rounds(50, 2000))
	during := shows("while it sweeps", took)
	// Another goes on where this one is killed.
	old := c.leader()
	old.kill()
	c.leader()
	old.start()
	c.ready()
	start := time.Now()
	for most := time.Now().Add(limit(10 * time.Minute)); said(swept) == 0; {
		write(50)
		if time.Now().After(most) {
			t.Fatal("it sweeps still")
		}
	}
	t.Logf("the rest was swept in %v", time.Since(start))
	after := shows("after", write(rounds(100, 5000)))

	if million {
		full := size()
		grow(events / 2)
		level()
		t.Logf("state.db had %d bytes when it was trimmed, %d when it was swept and %d after %d events more", whole, full, size(), events/2)
		if most := full + full/20 + 2*sweepAhead; size() > most {
			t.Errorf("state.db grew to %d bytes", size())
		}
		for what, p99 := range map[string]time.Duration{"while it swept": during, "after": after} {
			if p99 > 3*was+50*time.Millisecond {
				t.Errorf("p99 of writes was %v, and %v %s", was, p99, what)
			}
		}
	} else {
		grow(2 * trimLeast)
	}
	// All show the same, and end with what was written last.
	slack := max(keep/100, trimLeast)
	until(t, limit(15*time.Second), func() error {
		c.converge()
		for _, n := range c.nodes {
			v := n.verify(t)
			if !v.OK || int(v.Events) > keep+slack+10 || int(v.Events) < keep {
				return fmt.Errorf("%s: %+v, want some %d events", n.id, v, keep)
			}
		}
		return nil
	})
	for _, n := range c.nodes {
		for _, since := range []string{"?stale&since=0", "?stale&since=1"} {
			s, a, err := openStream(n, "bench", since)
			if err != nil || a == nil || a.status != http.StatusGone || a.slug() != "gone" {
				t.Errorf("%s: stream %s: %v, %v", n.id, since, a, err)
			}
			if s != nil {
				s.close()
			}
		}
		if a := n.ask(t, "GET", keyPath("bench", "single1")+"?stale&version=1", ""); a.status != http.StatusGone {
			t.Errorf("%s: version 1: %v", n.id, a)
		}
	}
}

// TestTrimRestore: the event of a restore, which is in every namespace's trail, goes like any other, and who
// follows a namespace is told so.
func TestTrimRestore(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"), set("quiet", "k", "v"), // 1, 2
		&command{Op: "stage", Restore: &restoring{ID: "r", Entries: []stagedEntry{{"app", "k", "w", "string"}, {"quiet", "k", "v", "string"}},
			Spaces: []stagedSpace{{"app", nsMeta{}}, {"quiet", nsMeta{}}}}},
		&command{Op: "restore", Restore: &restoring{ID: "r", Part: 1, Sum: "00", Revision: 1}, Actor: "ops@test"}, // 3
		set("app", "k", "x"), set("app", "k", "y")) // 4, 5
	count := func(path string) string {
		said := ask(t, newReader(t, w), path, "Accept", "text/event-stream")
		if !strings.HasPrefix(said, "200 ") {
			return said
		}
		return fmt.Sprint(strings.Count(said, "\nid: "), " events")
	}
	list := func(ns string) int {
		return strings.Count(ask(t, newReader(t, w), "/api/v1/audit/"+ns+"?stale"), `"id":`)
	}
	if a, q := list("app"), list("quiet"); a != 4 || q != 2 {
		t.Fatalf("%d and %d events before", a, q)
	}
	cursor := cursorOf('a', append(place{3, 0}.appendTo(nil), place{1, 0}.appendTo(nil)...))
	w.apply(w.trimOf(2))
	for _, swept := range []bool{false, true} {
		if swept {
			w.sweepAll()
		}
		if a, q := list("app"), list("quiet"); a != 3 || q != 1 {
			t.Errorf("swept %t: %d and %d events when the restore is the first", swept, a, q)
		}
		if said := ask(t, newReader(t, w), "/api/v1/audit/app?stale&cursor="+cursor); strings.Count(said, `"id":`) != 1 {
			t.Errorf("swept %t: behind a cursor at the restore: %s", swept, said)
		}
	}
	w.apply(w.trimOf(4))
	for _, swept := range []bool{false, true} {
		if swept {
			w.sweepAll()
		}
		if a, q := list("app"), list("quiet"); a != 1 || q != 0 {
			t.Errorf("swept %t: %d and %d events", swept, a, q)
		}
		for path, want := range map[string]string{
			"/api/v1/audit/quiet?stale&since=2": "410 gone",
			"/api/v1/audit/quiet?stale&since=3": "0 events",
			"/api/v1/audit/app?stale&since=3":   "410 gone",
			"/api/v1/audit/app?stale&since=4":   "1 events",
			"/api/v1/audit?stale&since=4":       "3 events",
		} {
			if got := count(path); got != want {
				t.Errorf("swept %t: %s: %s, want %s", swept, path, got, want)
			}
		}
		var buf []byte
		if _, _, err := newReader(t, w).collect("quiet", place{2, 0}, nil, &buf); !errors.Is(err, errGone) {
			t.Errorf("swept %t: a stream that is open goes on without the restore: %v", swept, err)
		}
		if err := w.st.view(func(tx *bbolt.Tx) error { return cmp.Or(checkChain(tx), checkRecords(tx)) }); err != nil {
			t.Errorf("swept %t: %v", swept, err)
		}
	}
}
