package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/bbolt"
)

// A watcher is a doorbell: it holds one ring, and whoever hears it reads for himself what
// has changed. So a slow client costs reads, not memory, and Apply waits for nobody.
type watcher chan struct{}

// watches are the doorbells of everyone who waits, by what they wait for: an entry (as
// entryKey names it), a namespace (its name) or everything ("").
type watches struct {
	mu    sync.Mutex // guards bells
	bells map[string]map[watcher]struct{}
}

// add registers a watcher. Register, then read, then wait: nothing falls between.
func (w *watches) add(subject string) watcher {
	bell := make(watcher, 1)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.bells == nil {
		w.bells = map[string]map[watcher]struct{}{}
	}
	if w.bells[subject] == nil {
		w.bells[subject] = map[watcher]struct{}{}
	}
	w.bells[subject][bell] = struct{}{}
	return bell
}

// remove takes a watcher away; it leaves nothing behind.
func (w *watches) remove(subject string, bell watcher) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.bells[subject], bell)
	if len(w.bells[subject]) == 0 {
		delete(w.bells, subject)
	}
}

// ring wakes who waits for one of the subjects. It is called after the commit that changed
// them.
func (w *watches) ring(subjects [][]byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.bells) == 0 {
		return
	}
	for _, s := range subjects {
		for bell := range w.bells[string(s)] {
			bell.ring()
		}
	}
}

// ringAll wakes everyone: the whole state is another one.
func (w *watches) ringAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, bells := range w.bells {
		for bell := range bells {
			bell.ring()
		}
	}
}

func (w watcher) ring() {
	select {
	case w <- struct{}{}:
	default: // it is ringing already
	}
}

// maxWait is how long ?wait may hold an answer.
const maxWait = 5 * time.Minute

// errUnchanged is what a read returns instead of answering when the client would rather
// wait. It never reaches a client.
var errUnchanged = errors.New("unchanged")

// errClosed says that the client went away. It is for the log; nobody reads the answer.
var errClosed = &kind{slug: "closed", status: 499, title: "Client Closed The Request"}

// waits lets a read take ?wait: while its answer would be that nothing has changed, or that
// the thing is missing, it is held until what subject names changes.
func (s *server) waits(subject func(*call) string, read func(*call) error) func(*call) error {
	return func(c *call) error {
		if !c.q.Has("wait") {
			return read(c)
		}
		d, err := time.ParseDuration(c.q.Get("wait"))
		if err != nil || d <= 0 || d > maxWait {
			return errBadRequest.quoting("wait must be a time such as 30s, at most 5m, not %q", clip(c.q.Get("wait"), 40))
		}
		if c.q.Has("version") {
			return errBadRequest.because("wait and version exclude each other: an earlier version never changes")
		}
		leave, err := s.admit(c)
		if err != nil {
			return err
		}
		defer leave()
		sub := subject(c)
		bell := s.watches.add(sub)
		defer s.watches.remove(sub, bell)
		timer := time.NewTimer(d)
		defer timer.Stop()
		if err := s.notBehind(c, d); err != nil {
			return err
		}
		c.waiting = true
		for {
			if err := c.stillAllowed(); err != nil {
				return err
			}
			if err := read(c); err != errUnchanged {
				return err
			}
			c.waited = true
			select {
			case <-bell:
			case <-c.who.over():
			case <-timer.C:
				c.waiting = false
			case <-s.ending:
				c.waiting = false
				c.w.Header()["Connection"] = []string{"close"}
			case <-c.r.Context().Done():
				return errClosed.because("the client went away while it waited")
			}
		}
	}
}

// notBehind lets this node catch up, for at most d, with a client that has seen a newer state at
// another: what a wait tells of does not go back. A tag beyond the leader's revision is none that
// this store has made.
func (s *server) notBehind(c *call, d time.Duration) error {
	cond, err := conditionOf(c.r)
	if err != nil || len(cond.none) == 0 {
		return err
	}
	newest := slices.Max(cond.none)
	if s.store.at().rev >= newest {
		return nil
	}
	ctx, cancel := context.WithTimeout(c.r.Context(), min(d, s.cfg.requestTimeout()))
	defer cancel()
	rev, err := s.node.leaderRevision(ctx, readable)
	if err != nil {
		return err
	}
	if newest <= rev && !s.store.waitFor(ctx, newest) {
		return errBehind.because("this node has not applied revision %d in time; it is at %d", newest, s.store.at().rev)
	}
	return nil
}

func entrySubject(c *call) string     { return string(entryKey(c.ns, c.key)) }
func namespaceSubject(c *call) string { return c.ns }

// The event stream is Server-Sent Events (the HTML standard, section 9.2):
//
//	stream  = *( event / comment )
//	event   = "id: " revision "-" index LF "event: " action LF "data: " JSON LF LF
//	comment = ": " text LF LF
//
// For example:
//
//	id: 42-0
//	event: config.set
//	data: {"id":"42-0","revision":42,...}
const (
	keepAlive = 15 * time.Second
	// streamChunk and streamScan bound what one read transaction of a stream collects and looks
	// at, in bytes and events.
	streamChunk = 256 << 10
	streamScan  = 10_000
	// refusedTime is how long a client may take what it was sent before its key lost the stream.
	refusedTime = 500 * time.Millisecond
)

// streamed answers the trail as a stream where the client accepts one, else as a list.
func (s *server) streamed(list func(*call) error) func(*call) error {
	return func(c *call) error {
		c.w.Header().Add("Vary", "Accept")
		if !c.accepts("text/event-stream", "application/json") {
			return list(c)
		}
		return s.stream(c, c.ns)
	}
}

// stream sends the events of ns, or all if ns is empty, oldest first, until the client
// goes away or the node shuts down. A client that resumes with the id of its last event misses
// none and sees none twice, on any node.
func (s *server) stream(c *call, ns string) error {
	for _, name := range []string{"limit", "cursor"} {
		if c.q.Has(name) {
			return errBadRequest.because("%s is for lists; a stream goes on", name)
		}
	}
	filter, err := c.eventFilter()
	if err != nil {
		return err
	}
	pos, given, err := c.streamStart()
	if err != nil {
		return err
	}
	leave, err := s.admit(c)
	if err != nil {
		return err
	}
	defer leave()
	if err := s.fresh(c); err != nil {
		return err
	}
	if given && pos.rev > s.store.at().rev {
		// The client was told by a node that is ahead of this one; or it never was.
		ctx, cancel := context.WithTimeout(c.r.Context(), s.cfg.requestTimeout())
		defer cancel()
		rev, err := s.node.leaderRevision(ctx, readable)
		if err != nil {
			return err
		}
		if pos.rev > rev {
			return errGone.because("the store is at revision %d and never was at %d; begin without an id", rev, pos.rev)
		}
		if !s.store.waitFor(ctx, pos.rev) {
			return errBehind.because("this node has not applied revision %d in time; it is at %d", pos.rev, s.store.at().rev)
		}
	}
	if given {
		err := s.store.view(func(tx *bbolt.Tx) error {
			gap, err := inGap(tx, pos.rev)
			if gap {
				err = errGone.because("revision %d is of the cluster before the backup that this one was made from; begin without an id", pos.rev)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	bell := s.watches.add(ns)
	defer s.watches.remove(ns, bell)
	if !given {
		pos = endOf(s.store.at().rev)
	}
	err = s.store.view(func(tx *bbolt.Tx) error {
		var n *namespace
		var err error
		if ns != "" {
			if n, err = getNamespace(tx, ns); err == nil && n == nil {
				err = errNotFound.because("there is and was no namespace %s", ns)
			}
		}
		if err == nil {
			pos, err = resume(tx, n, pos)
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := c.showStaleness(); err != nil {
		return err
	}
	h := c.w.Header()
	h["Content-Type"] = []string{"text/event-stream"}
	h["Cache-Control"] = []string{"no-store"}
	h["X-Accel-Buffering"] = []string{"no"} // proxies that know it pass events on at once
	if c.r.ProtoMajor == 1 {
		h["Connection"] = []string{"close"} // the write deadline would outlast the stream
	}
	c.w.WriteHeader(http.StatusOK)
	c.waited = true
	rc := http.NewResponseController(c.w)
	var mu sync.Mutex // guards final, and is held while the deadline is set
	final := false    // the deadline is not set any more
	// A client that does not take what it was sent keeps no stream that its key may not have.
	cutRefused := func() func() bool {
		return context.AfterFunc(c.who.held, func() {
			if _, err := s.auth.Load().identify(c.r, c.route, c.ns); err == nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if !final {
				final = true
				rc.SetWriteDeadline(time.Now().Add(refusedTime))
			}
		})
	}
	release := cutRefused()
	defer func() {
		release()
		mu.Lock()
		defer mu.Unlock()
		final = true
	}()
	send := func(b []byte) error {
		mu.Lock()
		if !final {
			rc.SetWriteDeadline(time.Now().Add(writeTime))
		}
		mu.Unlock()
		if len(b) > 0 {
			if _, err := c.w.Write(b); err != nil {
				return err
			}
		}
		return rc.Flush()
	}
	if c.r.Method == http.MethodHead {
		return nil
	}
	if err := send([]byte(": stream\n\n")); err != nil {
		return errClosed.because("%v", err)
	}
	tick := time.NewTicker(keepAlive)
	defer tick.Stop()
	for {
		for more := true; more; {
			if c.who.held.Err() != nil {
				if c.identify() != nil {
					return nil // the answer has begun; the next one says why
				}
				release()
				release = cutRefused()
			}
			buf := getBuffer()
			pos, more, err = s.collect(ns, pos, filter, buf)
			if err == nil && len(*buf) > 0 {
				if werr := send(*buf); werr != nil {
					err = errClosed.because("%v", werr)
				}
			}
			putBuffer(buf)
			if err != nil {
				return err
			}
			if more && c.r.Context().Err() != nil {
				return nil
			}
		}
		select {
		case <-bell:
		case <-c.who.over():
		case <-tick.C:
			if err := send([]byte(": \n\n")); err != nil {
				return errClosed.because("%v", err)
			}
		case <-s.ending:
			return nil
		case <-c.r.Context().Done():
			return nil
		}
	}
}

// streamStart reads behind which event a stream begins; given is false for "from now".
func (c *call) streamStart() (p place, given bool, err error) {
	if v := c.r.Header["Last-Event-Id"]; len(v) > 0 && v[0] != "" {
		rev, n, ok := strings.Cut(v[0], "-")
		r, err1 := strconv.ParseUint(rev, 10, 64)
		i, err2 := strconv.ParseUint(n, 10, 16)
		if !ok || err1 != nil || err2 != nil {
			return p, false, errBadRequest.quoting("Last-Event-ID %q is not the id of an event, such as 42-0", clip(v[0], 40))
		}
		return place{r, uint16(i)}, true, nil
	}
	if c.q.Has("since") {
		rev, err := c.number("since", 0)
		return endOf(rev), true, err
	}
	return p, false, nil
}

// endOf is the place behind the last event of a revision.
func endOf(rev uint64) place { return place{rev, math.MaxUint16} }

// collect appends the events behind pos to buf, as the stream sends them. It returns how
// far it looked, and whether there is more to look at. A stream that the trail's cut has overtaken ends
// with errGone.
func (s *server) collect(ns string, pos place, filter eventFilter, buf *[]byte) (place, bool, error) {
	more := false
	err := s.store.view(func(tx *bbolt.Tx) error {
		var n *namespace
		var err error
		if ns != "" {
			// Where the namespace has nothing new, what others have changed since need not be
			// looked at, now or later.
			if n, err = getNamespace(tx, ns); err != nil {
				return err
			}
			if n != nil {
				if pos, err = resume(tx, n, pos); err != nil {
					return err
				}
			}
			restore, err := lastRestore(tx, endOf(math.MaxUint64))
			if err != nil {
				return err
			}
			if n == nil || !pos.before(n.last) && !pos.before(restore) {
				if rev := storedRevision(tx); pos.rev < rev {
					pos = endOf(rev)
				}
				return nil
			}
		}
		if ns == "" {
			if pos, err = resume(tx, nil, pos); err != nil {
				return err
			}
		}
		cur := tx.Bucket(bucketTrail).Cursor()
		from := pos.appendTo(nil)
		k, v, err := seek(cur, bucketTrail, from)
		if err != nil {
			return err
		}
		if bytes.Equal(k, from) {
			k, v = cur.Next()
		}
		for scanned := 0; k != nil; k, v = cur.Next() {
			if scanned++; scanned > streamScan || len(*buf) > streamChunk {
				more = true
				return nil
			}
			ev, err := parseEvent(k, v)
			if err == nil && !pos.leadsTo(placeAt(k), jumps(ev.json)) {
				err = fmt.Errorf("state.db: the trail has a gap behind event %d-%d: %w", pos.rev, pos.n, errCorrupt)
			}
			if err != nil {
				return err
			}
			pos = placeAt(k)
			if filter.match(ev.json) {
				*buf = appendFrame(*buf, pos, ev.json)
			}
		}
		return nil
	})
	return pos, more, err
}

// appendFrame appends one event of a stream.
func appendFrame(b []byte, at place, stored []byte) []byte {
	b = append(b, "id: "...)
	b = strconv.AppendUint(b, at.rev, 10)
	b = append(b, '-')
	b = strconv.AppendUint(b, uint64(at.n), 10)
	b = append(b, "\nevent: "...)
	b = append(b, actionOf(stored)...)
	b = append(b, "\ndata: "...)
	b = append(b, stored...)
	return append(b, "\n\n"...)
}

// actionOf cuts an event's action out of its stored form, see eventFilter.
func actionOf(stored []byte) []byte {
	_, rest, _ := bytes.Cut(stored, []byte(`,"action":"`))
	action, _, _ := bytes.Cut(rest, []byte(`"`))
	return action
}
