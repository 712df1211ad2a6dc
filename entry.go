package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.etcd.io/bbolt"
)

// An entry is one setting. It is stored as the JSON that is sent, so that a read is a
// lookup and a copy.
type entry struct {
	Namespace string `json:"namespace"`
	Key       string `json:"key"`
	Value     string `json:"value"`
	Type      string `json:"type"`
	Version   uint64 `json:"version"`  // changes of this key since it was made, from 1
	Revision  uint64 `json:"revision"` // the store's revision that made it
	UpdatedAt string `json:"updatedAt"`
	UpdatedBy string `json:"updatedBy"`
}

// appendTo appends the entry as it is stored and sent.
func (e *entry) appendTo(b []byte) []byte {
	b = appendString(append(b, `{"namespace":`...), e.Namespace)
	b = appendString(append(b, `,"key":`...), e.Key)
	b = appendString(append(b, `,"value":`...), e.Value)
	b = appendString(append(b, `,"type":`...), e.Type)
	b = strconv.AppendUint(append(b, `,"version":`...), e.Version, 10)
	b = strconv.AppendUint(append(b, `,"revision":`...), e.Revision, 10)
	b = appendString(append(b, `,"updatedAt":`...), e.UpdatedAt)
	b = appendString(append(b, `,"updatedBy":`...), e.UpdatedBy)
	return append(b, '}')
}

// decode reads a stored entry back.
func (e entryRecord) decode() (entry, error) {
	var v entry
	if err := json.Unmarshal(e.json, &v); err != nil {
		return v, fmt.Errorf("state.db: an entry: %w", err) // its text may hold the value
	}
	return v, nil
}

const (
	maxKey       = 512 // bytes of a key
	maxPatchKeys = 10_000
)

// checkKey says what is wrong with a key, if anything.
func checkKey(key string) error {
	switch {
	case key == "":
		return errBadRequest.because("the key is empty")
	case len(key) > maxKey:
		return errBadRequest.because("the key has %d bytes; at most %d are allowed", len(key), maxKey)
	case !utf8.ValidString(key):
		return errBadRequest.quoting("the key %q is not UTF-8", clip(key, 100))
	case strings.ContainsFunc(key, isControl):
		return errBadRequest.quoting("the key %q holds a control character", clip(key, 100))
	}
	for seg := range strings.SplitSeq(key, "/") {
		if seg == "" || seg == "." || seg == ".." {
			return errBadRequest.quoting("the key %q has an empty segment, or one that is . or ..", clip(key, 100))
		}
	}
	return nil
}

var typeName = regexp.MustCompile(`^[a-z][a-z0-9.+-]{0,31}$`)

// checkValue says whether value may be kept as type typ. How large it may be is decided here, where it
// comes in, and not where it is applied: nodes with other limits must come to the same state.
func (c *call) checkValue(value, typ string) error {
	if most := c.s.cfg.Limits.MaxValueBytes; len(value) > most {
		return errTooLarge.because("the value has %d bytes; at most %d are allowed", len(value), most)
	}
	return checkValue(value, typ)
}

// checkValue says whether value can be kept as type typ. Types other than the four of the
// contract are kept unchecked.
func checkValue(value, typ string) error {
	if !typeName.MatchString(typ) {
		return errInvalidValue.quoting("the type %q is not a name of the form [a-z][a-z0-9.+-]{0,31}", clip(typ, 40))
	}
	if !utf8.ValidString(value) {
		return errInvalidValue.because("the value is not UTF-8; encode binary data, for example as base64")
	}
	switch typ {
	case "number":
		if !validNumber(value) {
			return errInvalidValue.because("the value is not a JSON number, as type number asks")
		}
	case "bool":
		if value != "true" && value != "false" {
			return errInvalidValue.because("the value is neither true nor false, as type bool asks")
		}
	case "json":
		if !json.Valid([]byte(value)) {
			return errInvalidValue.because("the value is not one JSON text, as type json asks")
		}
	}
	return nil
}

// valueOf turns a JSON value of a body into a value and the type that it has unless
// another is given. A null is neither; the caller has dealt with it.
func valueOf(raw []byte) (value, typ string, err error) {
	switch raw[0] {
	case '"':
		value, err = stringOf(raw)
		return value, "string", err
	case 't', 'f':
		return string(raw), "bool", nil
	case '{', '[':
		return string(raw), "json", nil
	}
	return string(raw), "number", nil
}

// current is what a precondition that failed found instead: null where nothing is.
type current struct {
	Revision  uint64 `json:"revision"`
	UpdatedBy string `json:"updatedBy"`
	UpdatedAt string `json:"updatedAt"`
}

// A condition is the If-Match and If-None-Match of a request (RFC 9110, section 13). Of
// the entity tags it keeps those that this program makes, revisions; any other is well
// formed and matches nothing.
type condition struct {
	hasMatch, matchAny bool
	match              []uint64
	hasNone, noneAny   bool
	none               []uint64
}

func (c *condition) given() bool { return c.hasMatch || c.hasNone }

// MarshalJSON writes the condition as the headers it was, for the command.
func (c condition) MarshalJSON() ([]byte, error) {
	return json.Marshal(map[string]string{
		"m": tagText(c.hasMatch, c.matchAny, c.match), "n": tagText(c.hasNone, c.noneAny, c.none)})
}

// tagText is "" for none given, "*" for any, else the revisions in brackets.
func tagText(has, any bool, revs []uint64) string {
	switch {
	case !has:
		return ""
	case any:
		return "*"
	}
	return fmt.Sprint(revs)
}

// UnmarshalJSON is the reverse of MarshalJSON.
func (c *condition) UnmarshalJSON(b []byte) error {
	var m map[string]string
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	read := func(s string, has, any *bool, revs *[]uint64) error {
		*has, *any = s != "", s == "*"
		if !*has || *any {
			return nil
		}
		for f := range strings.FieldsSeq(strings.Trim(s, "[]")) {
			n, err := strconv.ParseUint(f, 10, 64)
			if err != nil {
				return err
			}
			*revs = append(*revs, n)
		}
		return nil
	}
	if err := read(m["m"], &c.hasMatch, &c.matchAny, &c.match); err != nil {
		return err
	}
	return read(m["n"], &c.hasNone, &c.noneAny, &c.none)
}

// IsZero lets encoding/json leave an absent condition out.
func (c condition) IsZero() bool { return !c.given() }

// conditionOf reads the conditional headers of a request.
func conditionOf(r *http.Request) (c condition, err error) {
	if v := r.Header["If-Match"]; v != nil {
		c.hasMatch = true
		// RFC 9110, section 13.1.1: the comparison is strong, so a weak tag never matches.
		if c.matchAny, c.match, err = parseTags(strings.Join(v, ","), false); err != nil {
			return c, errBadRequest.quoting("If-Match: %v", err)
		}
	}
	if v := r.Header["If-None-Match"]; v != nil {
		c.hasNone = true
		if c.noneAny, c.none, err = parseTags(strings.Join(v, ","), true); err != nil {
			return c, errBadRequest.quoting("If-None-Match: %v", err)
		}
	}
	return c, nil
}

// parseTags reads "*" or a list of entity tags (RFC 9110, sections 8.8.3 and 5.6.1).
func parseTags(s string, weakToo bool) (any bool, revs []uint64, err error) {
	s = strings.Trim(s, " \t")
	if s == "*" {
		return true, nil, nil
	}
	some := false
	for {
		s = strings.TrimLeft(s, " \t,")
		if s == "" {
			if !some {
				err = fmt.Errorf(`empty; give "<revision>" or *`)
			}
			return false, revs, err
		}
		rest, weak := strings.CutPrefix(s, "W/")
		if !strings.HasPrefix(rest, `"`) {
			return false, nil, fmt.Errorf(`%q is not a list of entity tags such as "42", nor *`, clip(s, 60))
		}
		tag, after, ok := strings.Cut(rest[1:], `"`)
		after = strings.TrimLeft(after, " \t")
		if !ok || after != "" && after[0] != ',' || strings.ContainsFunc(tag, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
			return false, nil, fmt.Errorf(`%q is not a list of entity tags such as "42", nor *`, clip(s, 60))
		}
		some = true
		if n, err := strconv.ParseUint(tag, 10, 64); err == nil && strconv.FormatUint(n, 10) == tag && (weakToo || !weak) {
			revs = append(revs, n)
		}
		s = after
	}
}

// tagsHold evaluates one half of a condition.
func tagsHold(any bool, revs []uint64, cur *current) bool {
	return cur != nil && (any || slices.Contains(revs, cur.Revision))
}

// check decides the condition of a write against what is there, nil for nothing. The
// error is a 412 that shows it.
func (c *condition) check(cur *current) error {
	switch {
	case c.hasMatch && !tagsHold(c.matchAny, c.match, cur):
		if cur == nil {
			return preconditionFailed(nil, "nothing is there; create it with If-None-Match: *")
		}
		return preconditionFailed(cur, fmt.Sprintf("it is at revision %d now; read it again and decide anew", cur.Revision))
	case c.hasNone && tagsHold(c.noneAny, c.none, cur):
		return preconditionFailed(cur, fmt.Sprintf("it is there, at revision %d; change it with If-Match", cur.Revision))
	}
	return nil
}

// read decides the condition of a GET of something that is there; done says that the
// answer, a 304, is out.
func (c *condition) read(call *call, cur *current) (done bool, err error) {
	if c.hasMatch && !tagsHold(c.matchAny, c.match, cur) {
		return false, preconditionFailed(cur, fmt.Sprintf("it is of revision %d", cur.Revision))
	}
	if c.hasNone && tagsHold(c.noneAny, c.none, cur) {
		if call.waiting {
			return false, errUnchanged
		}
		return true, call.sendNothing(http.StatusNotModified)
	}
	return false, nil
}

// missing decides the condition of a GET of something that is not there, as err says.
func (c *condition) missing(call *call, err error) error {
	switch {
	case problemOf(err).kind != errNotFound:
		return err
	case c.hasMatch:
		return preconditionFailed(nil, problemOf(err).detail)
	case call.waiting && !c.hasNone:
		return errUnchanged
	}
	return err
}

// getEntry answers one entry; its ETag is its revision.
func (s *server) getEntry(c *call) error {
	raw := c.q.Has("raw")
	version, err := c.number("version", 0)
	if err != nil {
		return err
	}
	if version == 0 && c.q.Has("version") {
		return errBadRequest.because("version counts from 1")
	}
	cond, err := conditionOf(c.r)
	if err != nil {
		return err
	}
	if err := s.fresh(c); err != nil {
		return err
	}
	buf := getBuffer()
	defer putBuffer(buf)
	k := entryKey(c.ns, c.key)
	var rev uint64
	var cur *current
	err = s.store.view(func(tx *bbolt.Tx) (err error) {
		rev, cur, err = readEntry(tx, k, c, version, cond.given(), buf)
		return err
	})
	if err != nil {
		return cond.missing(c, err)
	}
	c.setETag(rev)
	c.sawRevision(rev)
	if cond.given() {
		if done, err := cond.read(c, cur); done || err != nil {
			return err
		}
	}
	if !raw {
		return c.sendJSON(http.StatusOK, *buf)
	}
	var e entry
	if err := json.Unmarshal(*buf, &e); err != nil {
		return err
	}
	return c.sendText([]byte(e.Value))
}

// readEntry puts the entry at k, or an earlier version of it if version is not 0, in
// buf. cur is decoded only if it is wanted.
func readEntry(tx *bbolt.Tx, k []byte, c *call, version uint64, wantCurrent bool, buf *[]byte) (rev uint64, cur *current, err error) {
	rec, ok, err := getEntry(tx, k)
	if err != nil {
		return 0, nil, err
	}
	if !ok {
		return 0, nil, errNotFound.because("there is no key %s in namespace %s", c.key, c.ns)
	}
	if version > rec.version {
		return 0, nil, errNotFound.because("key %s in namespace %s is at version %d", c.key, c.ns, rec.version)
	}
	rev = rec.rev
	*buf = append((*buf)[:0], rec.json...)
	if version != 0 && version != rec.version {
		old, err := findVersion(tx, rec, version)
		if err == errTrimmed {
			return 0, nil, errGone.because("version %d of key %s is older than the audit trail keeps", version, c.key)
		}
		if err != nil {
			return 0, nil, err
		}
		ev, err := old.decode()
		if err != nil {
			return 0, nil, err
		}
		was := entry{
			Namespace: ev.Namespace, Key: ev.Key, Value: *ev.NewValue, Type: ev.Type, Version: ev.Version,
			Revision: ev.Revision, UpdatedAt: ev.Timestamp, UpdatedBy: ev.Actor,
		}
		rev = was.Revision
		*buf = was.appendTo((*buf)[:0])
	}
	if wantCurrent {
		var e entry
		if err := json.Unmarshal(*buf, &e); err != nil {
			return 0, nil, err
		}
		cur = &current{e.Revision, e.UpdatedBy, e.UpdatedAt}
	}
	return rev, cur, nil
}

// listEntries answers the entries of a namespace in byte order of their keys; the ETag is
// the namespace's revision.
func (s *server) listEntries(c *call) error {
	limit, err := c.limit(1000, 10000)
	if err != nil {
		return err
	}
	after, err := c.cursor('c')
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
	p := newPage(limit, false)
	defer p.free()
	done := false
	err = s.store.view(func(tx *bbolt.Tx) error {
		var err error
		if _, done, err = s.checkNamespace(c, tx, cond); done || err != nil {
			return err
		}
		return p.walk(tx, bucketConfig, entryKey(c.ns, ""), []byte(c.q.Get("prefix")), after, 'c', func(k, rec []byte) ([]byte, error) {
			e, err := parseEntry(k, rec)
			return e.json, err
		})
	})
	if err != nil || done {
		return err
	}
	return p.send(c)
}

// putEntry sets a key.
func (s *server) putEntry(c *call) error {
	cond, err := conditionOf(c.r)
	if err != nil {
		return err
	}
	ch := change{Key: c.key}
	if c.q.Has("raw") || c.rawBody() {
		v := string(c.sent)
		ch.Value, ch.Type = &v, cmp.Or(c.q.Get("type"), "string")
		if c.q.Has("type") && c.q.Get("type") == "" {
			ch.Type = ""
		}
	} else if err := c.readChange(&ch); err != nil {
		return err
	}
	if err := c.checkValue(*ch.Value, ch.Type); err != nil {
		return err
	}
	res, err := s.propose(c, &command{Op: "set", NS: c.ns, Changes: []change{ch}, If: cond})
	if err != nil {
		return err
	}
	c.setETag(res.etag)
	return c.sendJSON(res.putStatus(), res.body)
}

// readChange reads the body {"value":…,"type":…}.
func (c *call) readChange(ch *change) error {
	ms, err := c.object()
	if err != nil {
		return err
	}
	given := ""
	for _, m := range ms {
		switch m.name {
		case "value":
			if m.raw[0] == 'n' {
				return errBadRequest.because("value is null; DELETE removes a key")
			}
			v, typ, err := valueOf(m.raw)
			if err != nil {
				return errBadRequest.because("value: %v", err)
			}
			ch.Value, ch.Type = &v, typ
		case "type":
			if m.raw[0] != '"' {
				return errBadRequest.because("type must be a string")
			}
			if given, err = stringOf(m.raw); err != nil {
				return errBadRequest.because("type: %v", err)
			}
			if given == "" {
				return errInvalidValue.because("type is empty; leave it out for string")
			}
		default:
			return unknownMember(m.name, "value, type")
		}
	}
	if ch.Value == nil {
		return errBadRequest.because(`the member value is missing; the body is {"value": …}`)
	}
	ch.Type = cmp.Or(given, ch.Type)
	return nil
}

// deleteEntry removes a key.
func (s *server) deleteEntry(c *call) error {
	cond, err := conditionOf(c.r)
	if err != nil {
		return err
	}
	if _, err := s.propose(c, &command{Op: "delete", NS: c.ns, Changes: []change{{Key: c.key}}, If: cond}); err != nil {
		return err
	}
	return c.sendNothing(http.StatusNoContent)
}

// patchEntries applies an RFC 7396 merge patch over a namespace's keys, whole or not at all.
func (s *server) patchEntries(c *call) error {
	cond, err := conditionOf(c.r)
	if err != nil {
		return err
	}
	ms, err := c.object()
	if err != nil {
		return err
	}
	if len(ms) > maxPatchKeys {
		return errTooLarge.because("the patch has %d keys; at most %d are allowed", len(ms), maxPatchKeys)
	}
	cmd := &command{Op: "patch", NS: c.ns, If: cond, Changes: make([]change, 0, len(ms))}
	for _, m := range ms {
		if err := checkKey(m.name); err != nil {
			return err
		}
		ch := change{Key: m.name}
		if m.raw[0] != 'n' {
			v, typ, err := valueOf(m.raw)
			if err != nil {
				return errBadRequest.quoting("%q: %v", m.name, err)
			}
			if err := c.checkValue(v, typ); err != nil {
				return problemOf(err).in(m.name)
			}
			ch.Value, ch.Type = &v, typ
		}
		cmd.Changes = append(cmd.Changes, ch)
	}
	slices.SortFunc(cmd.Changes, func(a, b change) int { return strings.Compare(a.Key, b.Key) })
	res, err := s.propose(c, cmd)
	if err != nil {
		return err
	}
	if res.etag != 0 {
		c.setETag(res.etag)
	}
	return c.sendJSON(http.StatusOK, fmt.Appendf(nil, `{"revision":%d,"changed":%d}`, res.rev, res.changed))
}

// putStatus is 201 for what was made and 200 for what was there.
func (r *result) putStatus() int {
	if r.created {
		return http.StatusCreated
	}
	return http.StatusOK
}
