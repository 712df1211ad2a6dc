package main

// Whatever comes in from outside is read by these: paths, keys and namespaces, JSON, lists of entity
// tags, and commands from raft's log. Each is held against a second opinion, so that a finding is more
// than a crash. Seeds are in testdata/fuzz.

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestFuzz looks for findings, a minute for each target.
func TestFuzz(t *testing.T) {
	long(t)
	needs(t, "go")
	for _, target := range []string{"FuzzPath", "FuzzKey", "FuzzNamespace", "FuzzCommands", "FuzzJSON", "FuzzTags", "FuzzBackup"} {
		cmd := exec.Command("go", "test", "-run", "^$", "-fuzz", "^"+target+"$", "-fuzztime", "1m", "-fuzzminimizetime", "10x", ".")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", target, err, out)
		}
	}
}

// keyForm is a key as the contract describes it, except for its length and "." and "..".
var keyForm = regexp.MustCompile(`^[^/\x00-\x1f\x7f-\x{9f}]+(/[^/\x00-\x1f\x7f-\x{9f}]+)*$`)

// validKey is the second opinion about keys.
func validKey(key string) bool {
	segs := strings.Split(key, "/")
	return len(key) <= 512 && utf8.ValidString(key) && keyForm.MatchString(key) && !slices.Contains(segs, ".") && !slices.Contains(segs, "..")
}

// FuzzKey: keys are taken and refused as the contract says, and one that is taken comes back from a
// path as it went in.
func FuzzKey(f *testing.F) {
	s := newReader(f, newWriter(f, f.TempDir()))
	s.mux = http.NewServeMux() // one that says what it has understood
	var ns, key string
	s.mux.HandleFunc("/api/v1/config/{ns}/{key...}", func(_ http.ResponseWriter, r *http.Request) { ns, key = r.PathValue("ns"), r.PathValue("key") })
	f.Fuzz(func(t *testing.T, want string) {
		err := checkKey(want)
		if (err == nil) != validKey(want) {
			t.Fatalf("%q: %v, want it taken: %v", want, err, validKey(want))
		}
		if err != nil {
			return
		}
		rec := httptest.NewRecorder()
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET " + keyPath("app", want) + " HTTP/1.1\r\nHost: test\r\n\r\n")))
		if err != nil {
			t.Fatal(err)
		}
		ns, key = "", ""
		s.ServeHTTP(rec, r)
		if rec.Code != http.StatusOK || key != want || ns != "app" {
			t.Fatalf("%q at %s: %d %s, understood as %q in %q", want, r.RequestURI, rec.Code, rec.Body, key, ns)
		}
	})
}

// FuzzPath: whatever the target of a request is, it is taken for what it says or refused, with no
// redirect and no fault of ours.
func FuzzPath(f *testing.F) {
	w := newWriter(f, f.TempDir())
	w.apply(set("app", "k", "v"))
	s := newReader(f, w)
	f.Fuzz(func(t *testing.T, target string) {
		r, err := http.ReadRequest(bufio.NewReader(io.LimitReader(strings.NewReader("GET "+target+" HTTP/1.1\r\nHost: test\r\nX-API-Key: "+adminKey+"\r\n\r\n"), 64<<10)))
		if err != nil || r.Header.Get("X-API-Key") != adminKey || len(r.Header) != 1 || r.ContentLength != 0 || strings.Contains(target, "wait=") {
			return // net/http refuses it, or it is another request than was meant
		}
		if r.Method != "GET" {
			return
		}
		rec := httptest.NewRecorder()
		s.ServeHTTP(rec, r)
		if err := documented("GET", r.RequestURI, &answer{rec.Code, rec.Header(), rec.Body.Bytes()}); err != nil {
			t.Fatal(err)
		}
		if rec.Code != 200 && (rec.Code < 400 || rec.Code >= 500) && rec.Code != 503 {
			t.Fatalf("%q: %d %s", target, rec.Code, rec.Body)
		}
		if rec.Code != 200 {
			if !json.Valid(rec.Body.Bytes()) {
				t.Fatalf("%q: %d with %q", target, rec.Code, rec.Body)
			}
			for name, v := range rec.Header() {
				if strings.ContainsAny(name+strings.Join(v, ""), "\r\n\x00") {
					t.Fatalf("%q: header %q: %q", target, name, v)
				}
			}
		}
		// What is taken for an entry's path is one, and nothing was cleaned.
		path, _, _ := strings.Cut(r.RequestURI, "?")
		ns, key, ok := strings.Cut(strings.TrimPrefix(path, "/api/v1/config/"), "/")
		if !ok || !strings.HasPrefix(path, "/api/v1/config/") {
			return
		}
		ns, err1 := url.PathUnescape(ns)
		key, err2 := url.PathUnescape(key)
		valid := err1 == nil && err2 == nil && namespaceForm.MatchString(ns) && validKey(key) && !strings.Contains(r.RequestURI, "#")
		refused := rec.Code == 400 && (strings.Contains(rec.Body.String(), "the path ") || strings.Contains(rec.Body.String(), "the key ") || strings.Contains(rec.Body.String(), "is not a namespace") || strings.Contains(rec.Body.String(), "request target"))
		if valid == refused {
			// An encoded / is a / of the key, but not where it makes a segment empty, "." or "..".
			t.Fatalf("%q: valid is %v, but %d %s", target, valid, rec.Code, rec.Body)
		}
	})
}

// namespaceForm is the contract's.
var namespaceForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// FuzzNamespace: namespaces and correlation ids have the contract's form, nothing else does.
func FuzzNamespace(f *testing.F) {
	ids := regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)
	f.Fuzz(func(t *testing.T, s string) {
		if validNamespace(s) != (namespaceForm.MatchString(s) && !strings.HasSuffix(s, "\n")) {
			t.Errorf("namespace %q: %v", s, validNamespace(s))
		}
		if validID(s) != (ids.MatchString(s) && !strings.HasSuffix(s, "\n")) {
			t.Errorf("id %q: %v", s, validID(s))
		}
	})
}

// FuzzCommands: what is read from raft's log, whatever it is, is the same when it is written and read
// again; one bit that is another is noticed.
func FuzzCommands(f *testing.F) {
	f.Fuzz(func(t *testing.T, text []byte, bit uint) {
		data := sealCommands(append(make([]byte, 4), text...))
		cs, err := decodeCommands(data)
		bad := bytes.Clone(data)
		bad[bit/8%uint(len(bad))] ^= 1 << (bit % 8)
		if _, err := decodeCommands(bad); !errors.Is(err, errCorrupt) {
			t.Fatalf("%q is read with bit %d changed: %v", text, bit, err)
		}
		if err != nil {
			return
		}
		once, err := encode(cs...)
		if err != nil {
			t.Fatalf("%q is read as %v, which is not written: %v", text, cs, err)
		}
		again, err := decodeCommands(once)
		if err != nil || len(again) != len(cs) {
			t.Fatalf("%q is written as %q, which is read as %v, %v", text, once, again, err)
		}
		twice, err := encode(again...)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%q is written as %q and then as %q (%v)", text, once, twice, err)
		}
		for i, c := range cs {
			a := again[i]
			if a.Op != c.Op || a.NS != c.NS || a.Actor != c.Actor || a.ID != c.ID || a.At != c.At || a.Until != c.Until ||
				len(a.Changes) != len(c.Changes) || a.If.given() != c.If.given() || !slices.Equal(a.If.match, c.If.match) || !slices.Equal(a.If.none, c.If.none) ||
				a.If.matchAny != c.If.matchAny || a.If.noneAny != c.If.noneAny {
				t.Fatalf("%q: command %d is %+v, then %+v", text, i, c, a)
			}
			for j, ch := range c.Changes {
				b := a.Changes[j]
				if b.Key != ch.Key || b.Type != ch.Type || (b.Value == nil) != (ch.Value == nil) || b.Value != nil && *b.Value != *ch.Value {
					t.Fatalf("%q: change %d of command %d is %+v, then %+v", text, j, i, ch, b)
				}
			}
		}
	})
}

// FuzzJSON: a body is taken if encoding/json takes it and it has none of what we refuse besides; then its
// members are those that encoding/json sees, byte for byte.
func FuzzJSON(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		err := checkJSON(b)
		if want := json.Valid(b) && utf8.Valid(b) && !unpaired(b) && plainObjects(b); (err == nil) != want {
			t.Fatalf("%q: %v, want it taken: %v", b, err, want)
		}
		if err != nil {
			if s := err.Error(); !utf8.ValidString(s) || strings.ContainsFunc(s, isControl) || len(s) > 400 {
				t.Fatalf("%q: the error is %q", b, s)
			}
			return
		}
		var want map[string]json.RawMessage
		isObject := json.Unmarshal(b, &want) == nil && bytes.TrimLeft(b, " \t\r\n")[0] == '{'
		ms, err := objectMembers(b)
		if (err == nil) != isObject || len(ms) != len(want) {
			t.Fatalf("%q has the members %v, %v; want %q", b, ms, err, want)
		}
		for _, m := range ms {
			if raw, ok := want[m.name]; !ok || !bytes.Equal(raw, m.raw) {
				t.Fatalf("%q: member %q is %q, want %q", b, m.name, m.raw, raw)
			}
			if m.raw[0] == 'n' {
				continue
			}
			v, typ, err := valueOf(m.raw)
			if err == nil {
				err = checkValue(v, typ)
			}
			if err != nil {
				t.Fatalf("%q: member %q is %q of type %s: %v", b, m.name, v, typ, err)
			}
			var s string
			if json.Unmarshal(m.raw, &s) == nil && (typ != "string" || v != s) || typ != "string" && v != string(m.raw) {
				t.Fatalf("%q: member %q is %q of type %s", b, m.name, v, typ)
			}
			if err := json.Unmarshal(appendString(nil, v), &s); err != nil || s != v {
				t.Fatalf("%q is written as %s: %v", v, appendString(nil, v), err)
			}
		}
	})
}

// unpaired reports a surrogate escape without its other half in a valid JSON text.
func unpaired(b []byte) bool {
	high := false // the escape before was the first half
	for i := 0; i < len(b); i++ {
		if b[i] != '\\' {
			if high {
				return true
			}
			continue
		}
		if i+5 >= len(b) || b[i+1] != 'u' {
			if high {
				return true
			}
			i++
			continue
		}
		n, err := strconv.ParseUint(string(b[i+2:i+6]), 16, 16)
		if err != nil {
			return high
		}
		low := n&0xfc00 == 0xdc00
		if high != low {
			return true
		}
		high = n&0xfc00 == 0xd800
		i += 5
	}
	return high
}

// plainObjects says of a valid JSON text that no object names a member twice, and that it has at most 100
// levels.
func plainObjects(b []byte) bool {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var names []map[string]bool // of each level, nil in an array
	isName := false
	for {
		tok, err := d.Token()
		if err != nil {
			return true
		}
		if name, ok := tok.(string); ok && isName {
			top := names[len(names)-1]
			if top[name] {
				return false
			}
			top[name] = true
			isName = false
			continue
		}
		switch tok {
		case json.Delim('{'):
			names = append(names, map[string]bool{})
		case json.Delim('['):
			names = append(names, nil)
		case json.Delim('}'), json.Delim(']'):
			names = names[:len(names)-1]
		}
		if len(names) > 100 {
			return false
		}
		isName = len(names) > 0 && names[len(names)-1] != nil
	}
}

// FuzzTags: a list of entity tags is taken if it has RFC 9110's form, and is the revisions that it names.
func FuzzTags(f *testing.F) {
	const tag = `(?:W/)?"[^\x00-\x20"\x7f]*"`
	list := regexp.MustCompile(`^[ \t,]*` + tag + `[ \t]*(?:,[ \t,]*` + tag + `[ \t]*)*(?:,[ \t,]*)?$`)
	number := regexp.MustCompile(`(W/)?"([^"]*)"`)
	f.Fuzz(func(t *testing.T, s string, weakToo bool) {
		every, revs, err := parseTags(s, weakToo)
		if star := strings.Trim(s, " \t") == "*"; star != every || star && err != nil {
			t.Fatalf("%q: %v, %v", s, every, err)
		}
		if every {
			return
		}
		if (err == nil) != list.MatchString(s) {
			t.Fatalf("%q: %v, want it taken: %v", s, err, list.MatchString(s))
		}
		if err != nil {
			return
		}
		var want []uint64
		for _, m := range number.FindAllStringSubmatch(s, -1) {
			if n, err := strconv.ParseUint(m[2], 10, 64); err == nil && strconv.FormatUint(n, 10) == m[2] && (weakToo || m[1] == "") {
				want = append(want, n)
			}
		}
		if !slices.Equal(revs, want) {
			t.Fatalf("%q: %d, want %d", s, revs, want)
		}
	})
}
