package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/bbolt"
)

// An event is one change as the audit trail keeps it, always the same on every
// node. Members that do not concern an action are empty, 0 or null, never missing.
type event struct {
	ID            string  `json:"id"` // <revision>-<index within it>
	Revision      uint64  `json:"revision"`
	Timestamp     string  `json:"timestamp"`
	Action        string  `json:"action"`
	Actor         string  `json:"actor"` // the principal, never its key
	Namespace     string  `json:"namespace"`
	Key           string  `json:"key"`
	Type          string  `json:"type"`
	Version       uint64  `json:"version"` // of a delete: the last version there was
	OldValue      *string `json:"oldValue"`
	NewValue      *string `json:"newValue"`
	CorrelationID string  `json:"correlationId"`
	Source        string  `json:"source"` // IP address of the client
	Hash          string  `json:"hash"`
}

// appendCanonical appends the event's canonical form: the members in the order above
// without hash, no white space, numbers in decimal and strings as appendString writes
// them.
func (e *event) appendCanonical(b []byte) []byte {
	str := func(name, v string) {
		b = append(b, name...)
		b = appendString(b, v)
	}
	num := func(name string, v uint64) {
		b = append(b, name...)
		b = strconv.AppendUint(b, v, 10)
	}
	opt := func(name string, v *string) {
		b = append(b, name...)
		if v == nil {
			b = append(b, "null"...)
		} else {
			b = appendString(b, *v)
		}
	}
	str(`{"id":`, e.ID)
	num(`,"revision":`, e.Revision)
	str(`,"timestamp":`, e.Timestamp)
	str(`,"action":`, e.Action)
	str(`,"actor":`, e.Actor)
	str(`,"namespace":`, e.Namespace)
	str(`,"key":`, e.Key)
	str(`,"type":`, e.Type)
	num(`,"version":`, e.Version)
	opt(`,"oldValue":`, e.OldValue)
	opt(`,"newValue":`, e.NewValue)
	str(`,"correlationId":`, e.CorrelationID)
	str(`,"source":`, e.Source)
	return append(b, '}')
}

// appendHashed appends the event as it is stored and sent, its canonical form with the
// member hash at the end, and returns its hash too: SHA-256 over the previous event's
// hash in lower-case hex (64 zeros before the first event), a line feed and the
// canonical form.
func (e *event) appendHashed(b []byte, prev [32]byte) ([]byte, [32]byte) {
	start := len(b)
	b = e.appendCanonical(b)
	var head [65]byte
	hex.Encode(head[:], prev[:])
	head[64] = '\n'
	h := sha256.New()
	h.Write(head[:])
	h.Write(b[start:])
	var sum [32]byte
	h.Sum(sum[:0])
	b = append(b[:len(b)-1], `,"hash":"`...)
	b = hex.AppendEncode(b, sum[:])
	return append(b, `"}`...), sum
}

// An eventRecord is a stored event. Its slices are valid for the transaction.
type eventRecord struct {
	prev   place  // the event before it in the same namespace
	places []byte // see store
	json   []byte
}

// getEvent finds the event at p; ok is false where the trail does not hold it, or not any more.
func getEvent(tx *bbolt.Tx, p place) (e eventRecord, ok bool, err error) {
	c, err := storedCut(tx)
	if err != nil || c.covers(p) {
		return e, false, err
	}
	k := p.appendTo(nil)
	rec, err := lookup(tx, bucketTrail, k)
	if err != nil || rec == nil {
		return e, false, err
	}
	e, err = parseEvent(k, rec)
	return e, err == nil, err
}

// namedEvent finds the event at p, which another record names, so it must be there: errTrimmed where it
// was trimmed.
func namedEvent(tx *bbolt.Tx, p place) (eventRecord, error) {
	e, ok, err := getEvent(tx, p)
	if err != nil || ok {
		return e, err
	}
	if c, err := storedCut(tx); err != nil || c.covers(p) {
		return e, cmp.Or(err, errTrimmed)
	}
	return e, fmt.Errorf("state.db: event %d-%d is not there: %w", p.rev, p.n, errCorrupt)
}

func parseEvent(k, rec []byte) (e eventRecord, err error) {
	b, err := unseal(bucketTrail, k, rec)
	if err != nil {
		return e, err
	}
	if len(b) < 11 || len(b) < 11+int(b[10])*10 {
		return e, fmt.Errorf("state.db: event %x: %w", k, errCorrupt)
	}
	n := int(b[10]) * 10
	return eventRecord{prev: placeAt(b), places: b[11 : 11+n], json: b[11+n:]}, nil
}

// hashOf cuts an event's hash out of its stored form, where it is last.
func hashOf(stored []byte) (h [32]byte) {
	if n := len(stored) - len(`"}`) - 64; n >= 0 {
		hex.Decode(h[:], stored[n:n+64])
	}
	return h
}

// follows reports whether an event, as stored, has the hash that its content gives behind an
// event with hash prev, and the id of its place.
func follows(stored []byte, at place, prev [32]byte) bool {
	n := len(stored) - len(`,"hash":""}`) - 64
	if n < 0 {
		return false
	}
	head := append(hex.AppendEncode(make([]byte, 0, 65), prev[:]), '\n')
	h := sha256.New()
	h.Write(head)
	h.Write(stored[:n])
	h.Write([]byte("}"))
	sum := hashOf(stored)
	id := fmt.Appendf(nil, `{"id":"%d-%d",`, at.rev, at.n)
	return bytes.Equal(h.Sum(nil), sum[:]) && bytes.HasPrefix(stored, id)
}

// tailLength is how many events checkTail looks at.
const tailLength = 1000

// checkTail checks that the trail ends where pos says, and that its last events follow each other, or
// the cut.
func checkTail(tx *bbolt.Tx, pos *position) error {
	cur := tx.Bucket(bucketTrail).Cursor()
	k, v := cur.Last()
	want := pos.hash
	if k == nil && pos.rev == 0 {
		return nil
	}
	if k == nil || placeAt(k).rev != pos.rev {
		return fmt.Errorf("the audit trail does not end at revision %d: %w", pos.rev, errCorrupt)
	}
	for range tailLength {
		at := placeAt(k)
		ev, err := parseEvent(k, v)
		if err != nil {
			return err
		}
		if hashOf(ev.json) != want {
			return fmt.Errorf("the audit trail's hash chain is broken behind event %d-%d: %w", at.rev, at.n, errCorrupt)
		}
		stored := ev.json
		k, v = cur.Prev()
		first := k == nil || pos.cut.covers(placeAt(k))
		if want = pos.cut.hash; !first {
			before, err := parseEvent(k, v)
			if err != nil {
				return err
			}
			want = hashOf(before.json)
		}
		if !follows(stored, at, want) {
			return fmt.Errorf("the audit trail's hash chain is broken at event %d-%d: %w", at.rev, at.n, errCorrupt)
		}
		if first {
			break
		}
	}
	return nil
}

// A verification is the answer of /api/v1/verify.
type verification struct {
	OK     bool   `json:"ok"`
	Events uint64 `json:"events"` // that fit
	First  string `json:"first"`  // ids; empty where there are none
	Last   string `json:"last"`
	Hash   string `json:"hash"`            // of the last
	Event  string `json:"event,omitempty"` // the first that does not fit
	Detail string `json:"detail,omitempty"`
}

// verify recomputes the hash chain of the trail on this node from the cut on, or of the revisions from
// ?from to ?to.
func (s *server) verify(c *call) error {
	from, err := c.number("from", 0)
	if err != nil {
		return err
	}
	to, err := c.number("to", math.MaxUint64)
	if err != nil {
		return err
	}
	if from > to {
		return errBadRequest.because("from is greater than to")
	}
	if err := s.fresh(c); err != nil {
		return err
	}
	c.waited = true // it takes as long as the trail is
	v, pos, prev := verification{OK: true}, place{}, [32]byte{}
	if from > 0 {
		pos = endOf(from - 1)
	}
	for more := true; more && v.OK; {
		if err := c.r.Context().Err(); err != nil {
			return errClosed.because("%v", err)
		}
		err := s.store.view(func(tx *bbolt.Tx) (err error) {
			more, err = v.check(tx, &pos, &prev, from, to)
			return err
		})
		if err != nil {
			return err
		}
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return c.sendJSON(http.StatusOK, b)
}

// check goes on behind pos, whose event has hash prev, for one transaction; more says that there
// is more to check. Where the trail was trimmed beyond pos, it begins anew at the cut.
func (v *verification) check(tx *bbolt.Tx, pos *place, prev *[32]byte, from, to uint64) (more bool, err error) {
	c, err := storedCut(tx)
	if err != nil {
		return false, err
	}
	if c.at.rev > 0 && (0 < from && pos.before(c.at) || to <= c.at.rev) {
		return false, c.gone("leave from out, or name a later revision")
	}
	if pos.before(c.at) {
		*v, *pos = verification{OK: true}, endOf(c.at.rev)
	}
	cur := tx.Bucket(bucketTrail).Cursor()
	behind := pos.appendTo(nil)
	k, rec, err := seek(cur, bucketTrail, behind)
	if err != nil {
		return false, err
	}
	if v.Events == 0 {
		// The hash that the first event follows is that of the one before it, if any, or the cut's.
		before, brec := cur.Prev()
		if k == nil {
			before, brec = cur.Last()
		}
		*prev = c.hash
		if before != nil && !c.covers(placeAt(before)) {
			ev, err := parseEvent(before, brec)
			if err != nil {
				return false, err
			}
			*prev = hashOf(ev.json)
		}
		k, rec = cur.Seek(behind)
	} else if bytes.Equal(k, behind) {
		k, rec = cur.Next()
	}
	for scanned := 0; k != nil; k, rec = cur.Next() {
		if placeAt(k).rev > to {
			_, err := unseal(bucketTrail, k, rec) // it is the end, unless its key was damaged
			return false, err
		}
		if scanned++; scanned > streamScan {
			return true, nil
		}
		at := placeAt(k)
		id := fmt.Sprintf("%d-%d", at.rev, at.n)
		ev, err := parseEvent(k, rec)
		if err != nil {
			return false, err
		}
		if !follows(ev.json, at, *prev) {
			v.OK, v.Event, v.Detail = false, id, "its hash is not that of its content behind the event before it"
			return false, nil
		}
		*pos, *prev = at, hashOf(ev.json)
		if v.Events == 0 {
			v.First = id
		}
		v.Events++
		v.Last, v.Hash = id, hex.EncodeToString(prev[:])
	}
	if end := storedRevision(tx); pos.rev < end {
		v.OK, v.Event, v.Detail = false, v.Last, fmt.Sprintf("the trail ends here, and the store is at revision %d", end)
	}
	return false, nil
}

// decode reads the stored JSON back.
func (e eventRecord) decode() (*event, error) {
	ev := new(event)
	if err := json.Unmarshal(e.json, ev); err != nil {
		return nil, fmt.Errorf("state.db: event %.60s: %w", e.json, err)
	}
	return ev, nil
}

// stamp writes a time of the log, nanoseconds since 1970, as RFC 3339 in UTC. All have
// nine digits of a second, so they also sort as text.
func stamp(nanos int64) string {
	return time.Unix(0, nanos).UTC().Format("2006-01-02T15:04:05.000000000Z")
}

// isStamp reports whether stamp may have written s.
func isStamp(s string) bool {
	t, err := time.Parse(time.RFC3339Nano, s)
	return err == nil && stamp(t.UnixNano()) == s
}

// An eventFilter selects events by their stored bytes. In the canonical form a quote
// inside a string is escaped, so `,"key":"x"` occurs where it is a member and nowhere
// else: no event is decoded to be passed over.
type eventFilter [][]byte

// eventFilter reads the parameters that select events. The namespace of the route is part
// of it.
func (c *call) eventFilter() (eventFilter, error) {
	var f eventFilter
	add := func(name, value string) {
		f = append(f, append(appendString([]byte(`,"`+name+`":`), value), ','))
	}
	if c.ns != "" {
		add("namespace", c.ns)
	}
	for _, name := range []string{"key", "actor", "correlationId"} {
		if !c.q.Has(name) {
			continue
		}
		if c.q.Get(name) == "" {
			return nil, errBadRequest.because("the parameter %s is empty; give a value or leave it out", name)
		}
		add(name, c.q.Get(name))
	}
	return f, nil
}

// match reports whether an event is selected. That of a restore is of every namespace.
func (f eventFilter) match(stored []byte) bool {
	for _, m := range f {
		if !bytes.Contains(stored, m) && !(bytes.HasPrefix(m, []byte(`,"namespace":`)) && jumps(stored)) {
			return false
		}
	}
	return true
}

// auditScan is how many events a page of the trail looks at in one transaction when a filter passes
// most of them over; then it goes on in another. It is a variable for a test's sake.
var auditScan = 50_000

// listAudit answers the trail of one namespace, newest first.
func (s *server) listAudit(c *call) error { return s.audit(c, c.ns) }

// listAllAudit answers the whole trail, newest first.
func (s *server) listAllAudit(c *call) error { return s.audit(c, "") }

// audit answers a page of the trail of ns, or of all if ns is empty.
func (s *server) audit(c *call, ns string) error {
	limit, err := c.limit(50, 1000)
	if err != nil {
		return err
	}
	since, err := c.number("since", 0)
	if err != nil {
		return err
	}
	from := place{rev: math.MaxUint64, n: math.MaxUint16} // the newest place that may be shown
	var own *place                                        // see newestFirst
	given := false                                        // by the client
	if cur, err := c.cursor('a'); err != nil {
		return err
	} else if cur != nil {
		if len(cur) != 10 && (len(cur) != 20 || ns == "") {
			return errCursor
		}
		if from = placeAt(cur); len(cur) == 20 {
			p := placeAt(cur[10:])
			own = &p
		}
		given = true
	}
	filter, err := c.eventFilter()
	if err != nil {
		return err
	}
	if err := s.fresh(c); err != nil {
		return err
	}

	p := newPage(limit, false)
	defer p.free()
	for more := true; more; {
		if err := c.r.Context().Err(); err != nil {
			return errClosed.because("%v", err)
		}
		err := s.store.view(func(tx *bbolt.Tx) error {
			cut, err := storedCut(tx)
			if err == nil && given && cut.covers(from) {
				err = cut.gone("begin without a cursor")
			}
			if err != nil {
				return err
			}
			more, given = false, false
			next, err := newestFirst(tx, ns, from, own)
			if err != nil {
				return err
			}
			for scanned := 0; ; scanned++ {
				at, ev, err := next()
				if err != nil || at.rev <= since {
					return err
				}
				if scanned == auditScan {
					from, own, more = at, nil, true
					if ns != "" && jumps(ev.json) {
						own = &ev.prev
					}
					return nil
				}
				if !filter.match(ev.json) {
					continue
				}
				if p.full() {
					cur := at.appendTo(nil)
					if ns != "" && jumps(ev.json) {
						cur = ev.prev.appendTo(cur)
					}
					p.next = cursorOf('a', cur)
					return nil
				}
				p.add(ev.json)
			}
		})
		if err != nil {
			return err
		}
	}
	return p.send(c)
}

// errCursor is the refusal of a cursor that was made up.
var errCursor = errBadRequest.because("cursor is not one that this list returned; begin without it")

// newestFirst walks the trail of ns, or the whole trail if ns is empty, back from the
// newest event at or before from. The walk ends with the zero place, behind the first event or the
// first that is kept. A namespace that never was is errNotFound.
//
// The trail of a namespace has the events of restores among its own. Of these the record that is returned
// has in prev the namespace's own event before it, which is not stored with it: who goes on there later
// gives it back as own.
func newestFirst(tx *bbolt.Tx, ns string, from place, own *place) (func() (place, eventRecord, error), error) {
	cut, err := storedCut(tx)
	if err != nil {
		return nil, err
	}
	if ns == "" {
		cur := tx.Bucket(bucketTrail).Cursor()
		var behind *place // the event that was returned before
		jump := false     // and it may stand behind any other
		return func() (place, eventRecord, error) {
			var k, v []byte
			var err error
			if behind != nil {
				k, v = cur.Prev()
			} else if k, v, err = seek(cur, bucketTrail, from.appendTo(nil)); err != nil {
				return place{}, eventRecord{}, err
			} else if k == nil {
				k, v = cur.Last()
			} else if !bytes.Equal(k, from.appendTo(nil)) {
				k, v = cur.Prev()
			}
			at := cut.at
			if k != nil && !cut.covers(placeAt(k)) {
				at = placeAt(k)
			} else {
				k = nil
			}
			if behind != nil && !at.leadsTo(*behind, jump) || behind == nil && from.rev == math.MaxUint64 && at.rev != storedRevision(tx) {
				return place{}, eventRecord{}, fmt.Errorf("state.db: the trail has a gap behind event %d-%d: %w", at.rev, at.n, errCorrupt)
			}
			behind = &at
			if k == nil {
				return place{}, eventRecord{}, nil
			}
			ev, err := parseEvent(k, v)
			jump = err == nil && jumps(ev.json)
			return at, ev, err
		}, nil
	}
	n, err := getNamespace(tx, ns)
	if err != nil {
		return nil, err
	}
	if n == nil {
		return nil, errNotFound.because("there is and was no namespace %s", ns)
	}
	if cut.covers(from) {
		return func() (place, eventRecord, error) { return place{}, eventRecord{}, nil }, nil
	}
	at := n.last
	restore, err := lastRestore(tx, from)
	if err != nil {
		return nil, err
	}
	switch {
	case own != nil:
		at = *own
		if restore != from || !at.before(from) {
			return nil, errCursor
		}
	case from.before(at) && restore == from:
		return nil, errCursor
	case from.before(at):
		// A cursor is the place of an event of this list, so it is a lookup.
		at = from
	}
	if at != n.last && !cut.covers(at) {
		ev, ok, err := getEvent(tx, at)
		if err != nil {
			return nil, err
		}
		if !ok || !bytes.Contains(ev.json, append(appendString([]byte(`,"namespace":`), ns), ',')) {
			return nil, errCursor
		}
	}
	return func() (place, eventRecord, error) {
		here := at
		if here.before(restore) {
			here = restore
		}
		if cut.covers(here) {
			return place{}, eventRecord{}, nil
		}
		ev, err := namedEvent(tx, here)
		if err != nil {
			return place{}, eventRecord{}, err
		}
		if here != restore {
			at = ev.prev
			return here, ev, nil
		}
		ev.prev = at
		before := place{here.rev - 1, math.MaxUint16}
		restore, err = lastRestore(tx, before)
		return here, ev, err
	}, nil
}

// leadsTo reports whether q can be the next event behind p, or behind the revision of which p is the
// end: no revision is without an event, but for those that the event at q jumps over.
func (p place) leadsTo(q place, jump bool) bool {
	return q.n > 0 && p == place{q.rev, q.n - 1} || q.n == 0 && (p.rev+1 == q.rev || jump && p.rev+restoreGap == q.rev)
}

// jumps reports whether an event, as stored, may leave out revisions in front of its own: a cluster that
// is made from a backup begins far above the backup's revision, see -restore.
func jumps(stored []byte) bool { return string(actionOf(stored)) == actionRestore }

// before reports whether p comes before q in the trail.
func (p place) before(q place) bool {
	return p.rev < q.rev || p.rev == q.rev && p.n < q.n
}

// appendTrail writes an event behind the trail's end; b is the batch that makes it. n is nil for an
// event of no namespace. places are those of a version, or nil.
func (b *batch) appendTrail(ev *event, n *namespace, at place, places []byte) error {
	rec := make([]byte, 4, 512+len(places)+len(ev.Key)+size(ev.OldValue)+size(ev.NewValue))
	prev := place{}
	if n != nil {
		prev, n.last = n.last, at
	}
	rec = prev.appendTo(rec)
	rec = append(rec, byte(len(places)/10))
	rec = append(rec, places...)
	rec, b.pos.hash = ev.appendHashed(rec, b.pos.hash)
	k := at.appendTo(make([]byte, 0, 10))
	b.pos.events++
	b.freed -= int64(len(k) + len(rec))
	return b.trail.Put(k, seal(k, rec))
}

func size(s *string) int {
	if s == nil {
		return 0
	}
	return len(*s)
}

// compareEvery is how often a node compares its trail with the others'.
const compareEvery = 5 * time.Second

// compareHashes compares the hash of the newest event with the other nodes' for the same
// revision: voters' word counts. Replicas of one log cannot differ, so a node that does, from a
// majority, stops; and one that no majority agrees with stops too.
func (n *raftNode) compareHashes() error {
	for {
		select {
		case <-n.ctx.Done():
			return nil
		case <-time.After(compareEvery):
		}
		pos := n.store.at()
		if pos.rev == 0 {
			continue
		}
		mine := hashNumbers(pos.hash)
		others, differ := n.voters(n.id), []string{}
		voters := len(n.voters(""))
		same := voters - len(others) // this one, if it votes
		for _, id := range others {
			ctx, cancel := context.WithTimeout(n.ctx, roundTime)
			theirs, err := n.ask(ctx, id, "/hash?revision="+strconv.FormatUint(pos.rev, 10), 4)
			cancel()
			switch {
			case err != nil: // away, or behind
			case slices.Equal(theirs, mine):
				same++
			default:
				differ = append(differ, id)
			}
		}
		if len(differ) == 0 {
			continue
		}
		slices.Sort(differ)
		if same > voters/2 {
			n.log.Error("another node's trail differs from the majority's", "revision", pos.rev, "nodes", strings.Join(differ, " "))
			continue
		}
		n.halt(fmt.Errorf("the audit trail of this node differs from that of %s at revision %d, and no majority has this node's: "+
			"move the data directory away and start again, and the node rejoins empty", strings.Join(differ, " and "), pos.rev))
	}
}

// hashNumbers is a hash as nodes send it.
func hashNumbers(h [32]byte) []uint64 {
	nums := make([]uint64, 4)
	for i := range nums {
		nums[i] = binary.BigEndian.Uint64(h[i*8:])
	}
	return nums
}

// hashAt is the hash of the newest event of a revision at most rev; false where the store
// has not come that far or has trimmed it. Of what was trimmed the newest is known.
func (s *store) hashAt(rev uint64) (h [32]byte, ok bool, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		cut, err := storedCut(tx)
		if err != nil || storedRevision(tx) < rev || rev < cut.at.rev {
			return err
		}
		next, err := newestFirst(tx, "", endOf(rev), nil)
		if err != nil {
			return err
		}
		at, ev, err := next()
		switch {
		case err != nil:
		case at.rev > 0:
			h, ok = hashOf(ev.json), true
		case cut.at.rev > 0:
			h, ok = cut.hash, true
		}
		return err
	})
	return h, ok, err
}
