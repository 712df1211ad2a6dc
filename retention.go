package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/bbolt"
)

// The trail is trimmed in two steps, each a command of the log. A trim moves the cut: from then on
// what stands up to it is not there for anybody, on any node. Sweeps delete the records behind it, a few at
// a time, so that no write waits for long. bbolt uses the pages again, the file does not shrink; and with
// each commit it writes the list of all free pages. A sweep of everything would make each write slow
// for as long as the pages are free, so no more is swept than is soon used again.

// A cut is where the trail was trimmed: the newest event that is gone. The zero cut is before the first
// event. The first event that is kept follows the cut's hash.
type cut struct {
	at   place // the last event of its revision
	hash [32]byte
}

// cutSize is how many bytes a cut has in the store.
const cutSize = 10 + 32

func (c cut) appendTo(b []byte) []byte { return append(c.at.appendTo(b), c.hash[:]...) }

func cutOf(b []byte) (c cut) {
	c.at = placeAt(b)
	copy(c.hash[:], b[10:])
	return c
}

// covers reports whether the event at p was trimmed.
func (c cut) covers(p place) bool { return !c.at.before(p) }

// gone says that what was asked for was trimmed, and what to do.
func (c cut) gone(instead string) error {
	return errGone.because("the audit trail was trimmed up to revision %d; %s", c.at.rev, instead)
}

// goneFrom is gone for a stream.
func (c cut) goneFrom() error {
	return c.gone("read what is there now, and follow the trail from that answer's Confman-Revision with since")
}

// storedCut is the cut as the transaction sees it.
func storedCut(tx *bbolt.Tx) (c cut, err error) {
	k := []byte("cut")
	rec := tx.Bucket(bucketMeta).Get(k)
	if rec == nil {
		return c, nil
	}
	b, err := unseal(bucketMeta, k, rec)
	if err != nil || len(b) != cutSize {
		return c, fmt.Errorf("state.db: bucket meta, key %q: %w", k, errCorrupt)
	}
	return cutOf(b), nil
}

// countEvents counts the events behind the one at p.
func countEvents(tx *bbolt.Tx, p place) (n uint64) {
	cur := tx.Bucket(bucketTrail).Cursor()
	for k, _ := cur.Seek(endOf(p.rev).appendTo(nil)); k != nil; k, _ = cur.Next() {
		n++
	}
	return n
}

// A trimming is what trim and sweep are about. The leader says what goes, so that nodes of different
// configurations and versions do the same.
type trimming struct {
	Rev uint64 `json:"rev"` // the newest revision that goes
	N   uint16 `json:"n"`   // of sweep: and the newest event of it

	// Of trim: where the cut was when the leader looked, and how many events it counted from there.
	After  uint64 `json:"after,omitempty"`
	Events uint64 `json:"events,omitempty"`
}

// trim applies the move of the cut, in a revision of its own. One that was proposed for another cut, or
// that does not move it, changes nothing.
func (b *batch) trim(c *command) (*result, error) {
	t := c.Trim
	if t == nil {
		return nil, fmt.Errorf("%w: trim of nothing", errEntry)
	}
	res := &result{rev: b.pos.rev}
	if t.After != b.pos.cut.at.rev || t.Rev <= b.pos.cut.at.rev || t.Rev > b.pos.rev || t.Events > b.pos.events {
		return res, nil
	}
	cur := b.trail.Cursor()
	k, _, err := seek(cur, bucketTrail, endOf(t.Rev).appendTo(nil))
	if err != nil {
		return nil, err
	}
	var rec []byte
	if k == nil {
		k, rec = cur.Last()
	} else {
		k, rec = cur.Prev()
	}
	if k == nil || placeAt(k).rev != t.Rev {
		return res, nil
	}
	ev, err := parseEvent(k, rec)
	if err != nil {
		return nil, err
	}
	b.pos.cut = cut{placeAt(k), hashOf(ev.json)}
	b.pos.events -= t.Events
	now := b.next(c)
	said := fmt.Sprintf(`{"through":%d,"events":%d,"hash":"%s"}`, t.Rev, t.Events, hex.EncodeToString(b.pos.cut.hash[:]))
	if err := b.storeEvent(c, now, "audit.trim", "", nil, &said); err != nil {
		return nil, err
	}
	meta := b.tx.Bucket(bucketMeta)
	if err := meta.Put([]byte("format"), binary.BigEndian.AppendUint32(nil, trimmedFormat)); err != nil {
		return nil, err
	}
	name := []byte("cut")
	if err := meta.Put(name, seal(name, b.pos.cut.appendTo(make([]byte, 4, 4+cutSize)))); err != nil {
		return nil, err
	}
	return &result{rev: b.pos.rev, changed: 1}, nil
}

// sweep deletes trimmed events up to a place. It makes no revision: nobody can tell that it happened.
func (b *batch) sweep(c *command) (*result, error) {
	if c.Trim == nil {
		return nil, fmt.Errorf("%w: sweep of nothing", errEntry)
	}
	last := place{c.Trim.Rev, c.Trim.N}
	var keys [][]byte // first: a cursor is not to be relied on while records are deleted
	cur := b.trail.Cursor()
	for k, rec := cur.First(); k != nil && !last.before(placeAt(k)) && b.pos.cut.covers(placeAt(k)); k, rec = cur.Next() {
		keys = append(keys, k)
		b.freed += int64(len(k) + len(rec))
	}
	for _, k := range keys {
		if err := b.trail.Delete(k); err != nil {
			return nil, err
		}
	}
	return &result{rev: b.pos.rev, changed: len(keys)}, nil
}

// resume returns the place from which a stream goes on behind pos: the same, or the cut where nothing
// that the stream is of was trimmed in between. Else it is errGone. n is the stream's namespace, nil
// for all.
func resume(tx *bbolt.Tx, n *namespace, pos place) (place, error) {
	c, err := storedCut(tx)
	if err != nil || !pos.before(c.at) {
		return pos, err
	}
	// The oldest event that a namespace has left names the one before it. It is looked for as far as one
	// transaction may look; streams that are open find it at once.
	if n != nil {
		restores, err := restorePlaces(tx) // events of every namespace
		if err != nil || slices.ContainsFunc(restores, func(p place) bool { return pos.before(p) && c.covers(p) }) {
			return pos, cmp.Or(err, c.goneFrom())
		}
		at := n.last
		for range streamScan {
			if c.covers(at) {
				if pos.before(at) {
					break
				}
				return c.at, nil
			}
			ev, err := namedEvent(tx, at)
			if err != nil {
				return pos, err
			}
			at = ev.prev
		}
	}
	return pos, c.goneFrom()
}

// checkAudit finds the first mistake in Audit.
func (c *config) checkAudit() error {
	for _, m := range []struct {
		name        string
		value, most int
	}{
		{"KeepDays", c.Audit.KeepDays, 36_500},
		{"KeepEvents", c.Audit.KeepEvents, 1_000_000_000_000},
	} {
		if m.value < 0 || m.value > m.most {
			return fmt.Errorf("%s: %d must be 0 to %d", "Audit."+m.name, m.value, m.most)
		}
	}
	return nil
}

const (
	// trimEvery is how often a leader looks whether the trail is too long. It costs nothing until it is.
	trimEvery = time.Second
	// trimLeast is how many events a trim takes off at least: each trim is an event too. A hundredth of
	// KeepEvents, where that is more. Events that are too old do not wait longer than trimLate for others.
	trimLeast = 500
	trimLate  = time.Hour

	// sweepEvents and sweepBytes bound what one sweep deletes, and so how long a write may have to wait
	// for it. Then sweeps rest, sweepRest times as long as the last one took; less where less is spare
	// than sweepAhead, so that the file does not grow for want of what could be swept.
	sweepEvents = 500
	sweepBytes  = 1 << 20
	sweepRest   = 4

	// sweepAhead is how many bytes are swept beyond those that the trail has grown by since, as this
	// node's store.spare has it since the start.
	sweepAhead = 32 << 20
)

// keepTrail trims the trail as the configuration says, and sweeps behind the cut, while this node
// leads.
func (n *raftNode) keepTrail() error {
	pause := trimEvery
	for n.rest(pause) {
		pause = trimEvery
		if !n.leads() {
			continue
		}
		err, more := n.trimTrail(), false
		if err == nil {
			more, err = n.sweepTrail()
		}
		if more {
			pause = 0
		}
		if errors.Is(err, errCorrupt) {
			n.halt(fmt.Errorf("%w; %s", err, rebuildState))
		}
		if err != nil {
			n.log.Debug("trail not trimmed", "error", err) // leadership moves, a disk is slow: the next look finds the same
		}
	}
	return nil
}

// rest waits; false when the node stops.
func (n *raftNode) rest(d time.Duration) bool {
	select {
	case <-n.ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// trimTrail proposes a trim where the trail is longer than it shall be.
func (n *raftNode) trimTrail() error {
	days, keep := n.cfg.Audit.KeepDays, uint64(n.cfg.Audit.KeepEvents)
	horizon := int64(0) // what is older goes
	if days > 0 {
		horizon = time.Now().Add(time.Duration(-days) * 24 * time.Hour).UnixNano()
	}
	pos := n.store.at()
	excess := uint64(0)
	if keep > 0 && pos.events >= keep+max(keep/100, trimLeast) {
		excess = pos.events - keep
	}
	t, err := n.store.trimmable(n.ctx, pos.cut, excess, horizon)
	if err != nil || t == nil {
		return err
	}
	if _, err := n.proposeOwn(&command{Op: "trim", Trim: t}); err != nil {
		return err
	}
	n.log.Info("audit trail trimmed", "through", t.Rev, "events", t.Events)
	return nil
}

// proposeOwn proposes a command of the cluster's own.
func (n *raftNode) proposeOwn(c *command) (*result, error) {
	c.Actor, c.ID = "confman", rand.Text()
	return n.propose(c, time.Now().Add(n.cfg.requestTimeout()))
}

// trimmable looks behind the cut c for the revisions that are older than horizon, nanoseconds since
// 1970, or that hold none but the oldest excess events, and returns the trim of them; nil where it is not
// worth an event. Times never decrease along the trail, so the first revision that stays ends the search.
func (s *store) trimmable(ctx context.Context, c cut, excess uint64, horizon int64) (*trimming, error) {
	if excess == 0 && horizon == 0 {
		return nil, nil
	}
	var (
		t      = &trimming{After: c.at.rev}
		pos    = endOf(c.at.rev) // what was looked at
		count  uint64            // events up to it
		old    bool              // its revision is too old
		others bool              // one of the events is not that of a trim
		found  bool              // one of those that go
		oldest string
	)
	tooOld, late := stamp(horizon), stamp(horizon-int64(trimLate))
	// whole decides about the revision whose last event is at pos; false is the end.
	whole := func() bool {
		if count == 0 || !old && count > excess {
			return count == 0
		}
		t.Rev, t.Events, found = pos.rev, count, others
		return true
	}
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		err := s.view(func(tx *bbolt.Tx) error {
			more = false
			cur := tx.Bucket(bucketTrail).Cursor()
			k, rec, err := seek(cur, bucketTrail, pos.appendTo(nil))
			if err != nil {
				return err
			}
			if k != nil && placeAt(k) == pos {
				k, rec = cur.Next()
			}
			for scanned, size := 0, 0; k != nil; k, rec = cur.Next() {
				if scanned++; scanned > streamScan || size > maxPage {
					more = true
					return nil
				}
				size += len(rec)
				at := placeAt(k)
				ev, err := parseEvent(k, rec)
				if err != nil {
					return err
				}
				if at.rev != pos.rev {
					if !whole() {
						return nil
					}
					when := timestampOf(ev.json)
					if old = when < tooOld; !old && count >= excess {
						return nil
					}
					oldest = cmp.Or(oldest, when)
				}
				pos = at
				count++
				others = others || string(actionOf(ev.json)) != "audit.trim"
			}
			whole()
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	switch {
	case !found: // nothing goes, or trims alone, which would go on for ever
		return nil, nil
	case excess == 0 && t.Events < trimLeast && oldest >= late:
		return nil, nil
	}
	return t, nil
}

// timestampOf cuts an event's time out of its stored form, see eventFilter. Times sort as text.
func timestampOf(stored []byte) string {
	_, rest, _ := bytes.Cut(stored, []byte(`,"timestamp":"`))
	when, _, _ := bytes.Cut(rest, []byte(`"`))
	return string(when)
}

// sweepTrail deletes what was trimmed, as far as its room is of use, until the next look is due; more says
// that it is not done.
func (n *raftNode) sweepTrail() (more bool, err error) {
	swept := 0
	for began := time.Now(); n.leads(); {
		last, err := n.store.sweepable()
		if err != nil || last.rev == 0 || n.store.spare.Load() > sweepAhead {
			if swept > 0 {
				n.log.Debug("audit trail swept", "sweeps", swept)
			}
			return false, err
		}
		swept++
		start := time.Now()
		if start.Sub(began) > trimEvery {
			return true, nil
		}
		if _, err := n.proposeOwn(&command{Op: "sweep", Trim: &trimming{Rev: last.rev, N: last.n}}); err != nil {
			return false, err
		}
		took := time.Since(start)
		if !n.rest(time.Duration(float64(sweepRest*took) * min(1, float64(n.store.spare.Load())/sweepAhead))) {
			return false, nil
		}
	}
	return false, nil
}

// sweepable is the last event of those that the next sweep deletes, at least one; zero where there is
// nothing left.
func (s *store) sweepable() (last place, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		c, err := storedCut(tx)
		if err != nil {
			return err
		}
		size := 0
		cur := tx.Bucket(bucketTrail).Cursor()
		k, rec := cur.First()
		for range sweepEvents {
			if k == nil || !c.covers(placeAt(k)) || size > sweepBytes {
				break
			}
			last = placeAt(k)
			size += len(rec)
			k, rec = cur.Next()
		}
		return nil
	})
	return last, err
}
