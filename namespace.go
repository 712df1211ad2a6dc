package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"

	"go.etcd.io/bbolt"
)

// nsMeta is what an operator says about a namespace, and when it was made.
type nsMeta struct {
	Description string `json:"description"`
	Owner       string `json:"owner"`
	CreatedAt   string `json:"createdAt"`
}

// maxMeta is how many bytes a description and an owner may have together. Each change of the
// namespace's keys writes them too.
const maxMeta = 16 << 10

// A namespace is its record in the store. One that is deleted keeps its record,
// because its trail can still be read.
type namespace struct {
	deleted bool
	keys    uint64
	rev     uint64
	last    place // newest event
	nsMeta
}

// getNamespace finds a namespace, deleted ones too; nil where it never was.
func getNamespace(tx *bbolt.Tx, ns string) (*namespace, error) {
	k := []byte(ns)
	rec, err := lookup(tx, bucketNamespaces, k)
	if err != nil || rec == nil {
		return nil, err
	}
	return parseNamespace(k, rec)
}

func parseNamespace(k, rec []byte) (*namespace, error) {
	b, err := unseal(bucketNamespaces, k, rec)
	if err != nil {
		return nil, err
	}
	n := &namespace{
		deleted: b[0]&1 != 0,
		keys:    binary.BigEndian.Uint64(b[1:]),
		rev:     binary.BigEndian.Uint64(b[9:]),
		last:    placeAt(b[17:]),
	}
	if err := json.Unmarshal(b[27:], &n.nsMeta); err != nil {
		return nil, fmt.Errorf("state.db: namespace %q: %w", k, err)
	}
	return n, nil
}

func (n *namespace) put(tx *bbolt.Tx, ns string) error {
	return tx.Bucket(bucketNamespaces).Put([]byte(ns), n.record(ns))
}

// record is the namespace as it is stored.
func (n *namespace) record(ns string) []byte {
	rec := make([]byte, 4, 160)
	var flags byte
	if n.deleted {
		flags = 1
	}
	rec = append(rec, flags)
	rec = binary.BigEndian.AppendUint64(rec, n.keys)
	rec = binary.BigEndian.AppendUint64(rec, n.rev)
	rec = n.last.appendTo(rec)
	rec = append(rec, `{"description":`...)
	rec = appendString(rec, n.Description)
	rec = append(rec, `,"owner":`...)
	rec = appendString(rec, n.Owner)
	rec = append(rec, `,"createdAt":`...)
	rec = appendString(rec, n.CreatedAt)
	rec = append(rec, '}')
	return seal([]byte(ns), rec)
}

// metaText is the metadata as events show it.
func (n *namespace) metaText() *string {
	b := appendString([]byte(`{"description":`), n.Description)
	b = append(appendString(append(b, `,"owner":`...), n.Owner), '}')
	s := string(b)
	return &s
}

// appendTo appends the namespace as it is sent.
func (n *namespace) appendTo(b []byte, path string) []byte {
	b = appendString(append(b, `{"path":`...), path)
	b = appendString(append(b, `,"description":`...), n.Description)
	b = appendString(append(b, `,"owner":`...), n.Owner)
	b = appendString(append(b, `,"createdAt":`...), n.CreatedAt)
	b = strconv.AppendUint(append(b, `,"keys":`...), n.keys, 10)
	b = strconv.AppendUint(append(b, `,"revision":`...), n.rev, 10)
	return append(b, '}')
}

// namespaceCurrent says who changed a namespace last, by its newest event. Where that was
// trimmed, only the revision is known.
func namespaceCurrent(tx *bbolt.Tx, n *namespace) (*current, error) {
	cur := &current{Revision: n.rev}
	at := n.last
	if at.rev < n.rev {
		at = place{n.rev, 0} // a restore changed it
	}
	rec, err := namedEvent(tx, at)
	if err == errTrimmed {
		return cur, nil
	}
	if err != nil {
		return nil, err
	}
	ev, err := rec.decode()
	if err != nil {
		return nil, err
	}
	cur.UpdatedBy, cur.UpdatedAt = ev.Actor, ev.Timestamp
	return cur, nil
}

// presentNamespace finds a namespace that is there; else the error is errNotFound.
func presentNamespace(tx *bbolt.Tx, ns string) (*namespace, error) {
	n, err := getNamespace(tx, ns)
	if err == nil && (n == nil || n.deleted) {
		err = errNotFound.because("there is no namespace %s", ns)
	}
	return n, err
}

// checkNamespace decides the conditions of a read of a namespace and sets its ETag.
// done says that the answer is out (304).
func (s *server) checkNamespace(c *call, tx *bbolt.Tx, cond condition) (n *namespace, done bool, err error) {
	n, err = presentNamespace(tx, c.ns)
	var cur *current
	if err == nil && cond.given() {
		if cur, err = namespaceCurrent(tx, n); err != nil {
			return nil, false, err
		}
	}
	if err != nil {
		return nil, false, cond.missing(c, err)
	}
	c.setETag(n.rev)
	c.sawRevision(n.rev)
	if cond.given() {
		if done, err = cond.read(c, cur); done || err != nil {
			return nil, done, err
		}
	}
	return n, false, nil
}

// listNamespaces answers the namespaces in byte order of their names; a limited key sees its own,
// and of the others not even that a page ends at one.
func (s *server) listNamespaces(c *call) error {
	limit, err := c.limit(1000, 10000)
	if err != nil {
		return err
	}
	after, err := c.cursor('n')
	if err != nil {
		return err
	}
	if err := s.fresh(c); err != nil {
		return err
	}
	p := newPage(limit, false)
	defer p.free()
	err = s.store.view(func(tx *bbolt.Tx) error {
		return p.walk(tx, bucketNamespaces, nil, []byte(c.q.Get("prefix")), after, 'n', func(k, rec []byte) ([]byte, error) {
			n, err := parseNamespace(k, rec)
			if err != nil || n.deleted || !c.who.covers(string(k)) {
				return nil, err
			}
			return n.appendTo(nil, string(k)), nil
		})
	})
	if err != nil {
		return err
	}
	return p.send(c)
}

// getNamespace answers one namespace; its ETag is its revision.
func (s *server) getNamespace(c *call) error {
	cond, err := conditionOf(c.r)
	if err != nil {
		return err
	}
	if err := s.fresh(c); err != nil {
		return err
	}
	var body []byte
	err = s.store.view(func(tx *bbolt.Tx) error {
		n, done, err := s.checkNamespace(c, tx, cond)
		if err == nil && !done {
			body = n.appendTo(nil, c.ns)
		}
		return err
	})
	if err != nil || body == nil {
		return err
	}
	return c.sendJSON(http.StatusOK, body)
}

// putNamespace replaces a namespace's metadata, making the namespace if need be.
func (s *server) putNamespace(c *call) error {
	cond, err := conditionOf(c.r)
	if err != nil {
		return err
	}
	ms, err := c.object()
	if err != nil {
		return err
	}
	meta := nsMeta{Owner: c.who.principal}
	for _, m := range ms {
		var to *string
		switch m.name {
		case "description":
			to = &meta.Description
		case "owner":
			to = &meta.Owner
		default:
			return unknownMember(m.name, "description, owner")
		}
		if m.raw[0] != '"' {
			return errBadRequest.because("%s must be a string", m.name)
		}
		if *to, err = stringOf(m.raw); err != nil {
			return errBadRequest.because("%s: %v", m.name, err)
		}
	}
	if len(meta.Description)+len(meta.Owner) > maxMeta {
		return errTooLarge.because("description and owner have %d bytes; at most %d are allowed", len(meta.Description)+len(meta.Owner), maxMeta)
	}
	res, err := s.propose(c, &command{Op: "describe", NS: c.ns, Meta: &meta, If: cond})
	if err != nil {
		return err
	}
	c.setETag(res.etag)
	return c.sendJSON(res.putStatus(), res.body)
}

// deleteNamespace removes a namespace that holds no keys.
func (s *server) deleteNamespace(c *call) error {
	cond, err := conditionOf(c.r)
	if err != nil {
		return err
	}
	if _, err := s.propose(c, &command{Op: "drop", NS: c.ns, If: cond}); err != nil {
		return err
	}
	return c.sendNothing(http.StatusNoContent)
}

// listKeys answers the names of a namespace's keys, as JSON or a line each.
func (s *server) listKeys(c *call) error {
	limit, err := c.limit(1000, 10000)
	if err != nil {
		return err
	}
	after, err := c.cursor('k')
	if err != nil {
		return err
	}
	cond, err := conditionOf(c.r)
	if err != nil {
		return err
	}
	if err := s.fresh(c); err != nil {
		return err
	}
	plain := c.accepts("text/plain", "application/json")
	c.w.Header().Set("Vary", "Accept")
	p := newPage(limit, plain)
	defer p.free()
	done := false
	err = s.store.view(func(tx *bbolt.Tx) error {
		var err error
		if _, done, err = s.checkNamespace(c, tx, cond); done || err != nil {
			return err
		}
		space := entryKey(c.ns, "")
		return p.walk(tx, bucketConfig, space, []byte(c.q.Get("prefix")), after, 'k', func(k, rec []byte) ([]byte, error) {
			if _, err := parseEntry(k, rec); err != nil || plain {
				return k[len(space):], err
			}
			return appendString(nil, string(k[len(space):])), nil
		})
	})
	if err != nil || done {
		return err
	}
	if !plain {
		return p.send(c)
	}
	if p.next != "" {
		next := *c.r.URL
		q := next.Query()
		q.Set("cursor", p.next)
		next.RawQuery = q.Encode()
		c.w.Header().Set("Link", "<"+next.RequestURI()+`>; rel="next"`)
	}
	return c.sendText(p.buf)
}
