package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// calm makes elections and unknown outcomes rarer on a busy machine, for tests that are
// about one leader and about answers that do not depend on time.
func calm(doc map[string]any) {
	with("Cluster", "RequestTimeout", 20_000)(doc)
	with("Cluster", "LowerElectionTimeout", 1000)(doc)
	with("Cluster", "UpperElectionTimeout", 2000)(doc)
}

// TestScripts runs the scripts of testdata/api against one live cluster of three.
func TestScripts(t *testing.T) {
	c := startCluster(t, 3, calm)
	t.Cleanup(func() { // when all have run
		d := apiDocument()
		d.makeRefusals(t, c)
		if missing := d.everyStatus(); !t.Failed() && len(missing) > 0 {
			t.Errorf("openapi.json documents what no script is answered; add it to testdata/api/statuses.txt:\n%s", strings.Join(missing, "\n"))
		}
	})
	runScripts(t, c, false)
}

// TestScriptsForwarded runs them through a follower that forwards: the client cannot
// tell the difference, and reads there what it has written.
func TestScriptsForwarded(t *testing.T) {
	runScripts(t, startCluster(t, 3, calm, with("Cluster", "Forward", true)), true)
}

// runScripts runs all scripts. Files whose names begin with "alone" run first and one
// by one: they see a store that nobody else writes, so they may count its revisions.
// The others run in parallel, each in namespaces that begin with the name of its file.
func runScripts(t *testing.T, c *cluster, forwarded bool) {
	files, err := filepath.Glob("testdata/api/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts in testdata/api: %v", err)
	}
	for _, alone := range []bool{true, false} {
		for _, file := range files {
			name := strings.TrimSuffix(filepath.Base(file), ".txt")
			if strings.HasPrefix(name, "alone") != alone {
				continue
			}
			t.Run(name, func(t *testing.T) {
				if !alone {
					t.Parallel()
				}
				s := &script{t: t, c: c, forwarded: forwarded, at: map[string]uint64{}, vars: map[string]string{
					"ns": name, "admin": adminKey, "reader": readerKey, "source": clientAddr,
				}}
				s.runFile(file)
			})
		}
	}
}

// A scriptCase is one paragraph of a script: a request and what must come of it.
//
// A script is text. Paragraphs are separated by empty lines and run in order,
// each on a connection of its own; a line that begins with # is a comment.
//
//	paragraph = request { header } { body } status { expect } [ json | { text } ]
//	request   = METHOD " " target { " @" note }
//	note      = "admin" | "reader" | "none" | "wrong"    whose key; admin if not said
//	          | "leader" | "follower"                     which node; leader if not said
//	header    = name ":" [ " " value ]
//	body      = "> " bytes                                lines are joined by line feeds
//	status    = 3DIGIT [ " raw" | " " slug [ ": " regexp ] ]
//	expect    = name ": " pattern | name " ~ " regexp
//	json      = what the body is as JSON, to the end of the paragraph
//	text      = "< " pattern                              lines are joined by line feeds
//
// Everywhere but in a note or a status, these are replaced before the line is used:
//
//	${name}      a variable: ns (a namespace of this file), leader (the leader's URL),
//	             admin and reader (keys), source (our address), or one that was captured
//	${name+1}    the number in a variable, plus one
//	${9*text}    text nine times
//	${\x00}      what the escape means in a Go string: any byte, anywhere
//
// A pattern, and any string in the expected JSON, may hold placeholders:
//
//	<rev> <int>     a number above 0, a number
//	<time> <hash>   RFC 3339 in UTC; 64 hexadecimal digits
//	<cursor> <id>   a cursor, a correlation id
//	<text> <any>    something, anything (in JSON: a string that is not empty, any value)
//	<absent>        no such header at all
//
// A name in a placeholder, as in <rev r1>, captures what is there; where the name
// has a value, what is there must be that. In JSON "<rev>" and "<int>" are numbers.
//
// The status of an error names its slug, and a regular expression that the detail
// must match; the problem document is then compared whole, and json, if any, holds
// the members that it has besides the usual. "raw" says that net/http refuses the
// request before the program sees it, so that only the status is compared.
//
// Each answer must besides keep the rules of every request: see ruleBreaks. A
// request to a follower waits until the follower has applied what the script saw.
//
// For example, this makes a key and sees a writer with an old ETag refused:
//
//	# A stale writer is told what is there.
//	PUT /api/v1/config/${ns}/a%20b
//	> {"value":"${3*x}"}
//	201
//	ETag: "<rev r1>"
//	{"namespace":"${ns}","key":"a b","value":"xxx","type":"string","version":1,
//	 "revision":"<rev r1>","updatedAt":"<time>","updatedBy":"<text me>"}
//
//	PUT /api/v1/config/${ns}/a%20b @admin
//	If-Match: "0"
//	> {"value":"y"}
//	412 precondition-failed
//	{"current":{"revision":${r1},"updatedBy":"${me}","updatedAt":"<time>"}}
type scriptCase struct {
	line           int // where the request stands in the file
	method, target string
	who, on        string
	header         []string // lines, as they are sent
	body           []string // lines; nil where the request has none

	status int
	slug   string // of an error
	detail string // regular expression
	raw    bool
	expect []string // header expectations, lines
	json   string
	text   []string // lines; nil where the body is not compared as text
}

var (
	requestLine = regexp.MustCompile(`^[A-Z]+ \S+( @(admin|reader|none|wrong|leader|follower))*$`)
	headerLine  = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9-]*:`)
	statusLine  = regexp.MustCompile(`^([1-5][0-9][0-9])(?: ([a-z][a-z-]*)(?:: (.+))?)?$`)
	expectLine  = regexp.MustCompile(`^([A-Za-z][A-Za-z0-9-]*)(: | ~ )(.*)$`)
	expansion   = regexp.MustCompile(`\$\{(?:([a-z]\w*)(?:\+(\d+))?|(\d+)\*(.+?)|(\\.+?))\}`)
)

// parseScript reads the paragraphs of a script. It is strict, for an expectation
// that is not understood is one that is not checked.
func parseScript(text string) ([]*scriptCase, error) {
	var cases []*scriptCase
	var c *scriptCase
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		switch {
		case line == "":
			if c != nil && c.status == 0 {
				return nil, fmt.Errorf("line %d: the paragraph ends without a status", i+1)
			}
			c = nil
		case line[0] == '#':
		case c == nil:
			if !requestLine.MatchString(line) {
				return nil, fmt.Errorf("line %d: not a request: %s", i+1, line)
			}
			f := strings.Fields(line)
			c = &scriptCase{line: i + 1, method: f[0], target: f[1], who: "admin", on: "leader"}
			for _, note := range f[2:] {
				switch note = note[1:]; note {
				case "leader", "follower":
					c.on = note
				default:
					c.who = note
				}
			}
			cases = append(cases, c)
		case c.status == 0 && statusLine.MatchString(line):
			m := statusLine.FindStringSubmatch(line)
			c.status, _ = strconv.Atoi(m[1]) // three digits
			c.raw = m[2] == "raw"
			c.slug, c.detail = m[2], m[3]
			if (c.status >= 400) != (c.slug != "") && c.status != http.StatusTemporaryRedirect {
				return nil, fmt.Errorf("line %d: an error, and nothing else, has a slug: %s", i+1, line)
			}
		case c.status == 0 && (line == ">" || strings.HasPrefix(line, "> ")):
			c.body = append(c.body, strings.TrimPrefix(line[1:], " "))
		case c.status == 0 && c.body == nil && headerLine.MatchString(line):
			c.header = append(c.header, line)
		case c.status != 0 && (line == "<" || strings.HasPrefix(line, "< ")):
			c.text = append(c.text, strings.TrimPrefix(line[1:], " "))
		case c.status != 0 && c.text == nil && strings.ContainsAny(line[:1], `{["`):
			for i < len(lines) && lines[i] != "" {
				c.json += lines[i]
				i++
			}
			i-- // the empty line ends the paragraph
		case c.status != 0 && c.text == nil && expectLine.MatchString(line):
			c.expect = append(c.expect, line)
		default:
			return nil, fmt.Errorf("line %d: neither part of a request nor of an expectation: %s", i+1, line)
		}
	}
	return cases, nil
}

// A script is one file in the course of running.
type script struct {
	t    *testing.T
	c    *cluster
	vars map[string]string
	seen uint64            // highest Confman-Revision of an answer
	at   map[string]uint64 // the same for each node

	forwarded bool // what is for the leader goes to a follower that forwards
}

// runFile runs the cases of file. A case that fails does not end it: what comes later
// may be about something else. Where followers forward, nothing is redirected, and
// only the leader says that it leads.
func (s *script) runFile(file string) {
	text, err := os.ReadFile(file)
	if err != nil {
		s.t.Fatal(err)
	}
	cases, err := parseScript(string(text))
	if err != nil {
		s.t.Fatalf("%s: %v", file, err)
	}
	for _, sc := range cases {
		if s.forwarded && (sc.status == http.StatusTemporaryRedirect || sc.target == "/health/ready") {
			continue
		}
		if diffs := s.run(sc); len(diffs) > 0 {
			s.t.Errorf("%s:%d: %s %s\n%s", file, sc.line, sc.method, clipped(sc.target), strings.Join(diffs, "\n"))
		}
	}
}

// clipped is s short enough for a report.
func clipped(s string) string {
	if len(s) > 1000 {
		return fmt.Sprintf("%.1000q... (%d bytes)", s, len(s))
	}
	return s
}

// run sends one case and returns how the answer differs from what it must be.
// Leadership may move while scripts run, on a busy machine: an answer that says so,
// and that nothing was applied, is not yet the answer to this case.
func (s *script) run(sc *scriptCase) (diffs []string) {
	var req *rawRequest
	until(s.t, 30*time.Second, func() error {
		var err error
		if req, err = s.request(sc); err != nil {
			diffs = []string{err.Error()}
			return nil
		}
		got, err := req.send()
		if err != nil {
			diffs = []string{err.Error()}
			return nil
		}
		if moved := got.StatusCode == http.StatusTemporaryRedirect || got.StatusCode == http.StatusServiceUnavailable; moved && got.StatusCode != sc.status {
			return fmt.Errorf("line %d: %s %s: %s\n%s", sc.line, req.method, clipped(req.target), got.Status, got.body)
		}
		caught := map[string]string{}
		diffs = append(s.differences(sc, req, got, caught), s.ruleBreaks(sc, req, got)...)
		maps.Copy(s.vars, caught)
		if len(diffs) > 0 {
			diffs = append(diffs, fmt.Sprintf("the answer: %s %v\n%s", got.Status, got.Header, clipped(string(got.body))))
		}
		return nil
	})
	return diffs
}

// expand replaces the ${...} of a line.
func (s *script) expand(line string) (string, error) {
	var failed error
	out := expansion.ReplaceAllStringFunc(line, func(x string) string {
		m := expansion.FindStringSubmatch(x)
		name, plus, times, text, escape := m[1], m[2], m[3], m[4], m[5]
		switch {
		case escape != "":
			v, err := strconv.Unquote(`"` + escape + `"`)
			if err != nil {
				failed = fmt.Errorf("%s: %v", x, err)
			}
			return v
		case times != "":
			n, _ := strconv.Atoi(times) // digits
			return strings.Repeat(text, n)
		}
		v, ok := s.vars[name]
		if !ok {
			failed = fmt.Errorf("%s: no such variable (did the case that captures it fail?)", x)
			return x
		}
		if plus == "" {
			return v
		}
		n, err := strconv.Atoi(v)
		more, _ := strconv.Atoi(plus) // digits
		if err != nil {
			failed = fmt.Errorf("%s: %q is not a number", x, v)
		}
		return strconv.Itoa(n + more)
	})
	return out, failed
}

// request makes the request of a case, and waits until the node has what the
// script has seen.
func (s *script) request(sc *scriptCase) (*rawRequest, error) {
	n := s.c.leader()
	s.vars["leader"] = n.url
	if sc.on == "follower" || s.forwarded {
		n = s.c.followers()[0]
		until(s.t, 30*time.Second, func() error {
			if _, st, err := n.status(); err != nil || st.Revision < s.seen {
				return fmt.Errorf("%s is at revision %d, the script has seen %d (%v)", n.id, st.Revision, s.seen, err)
			}
			return nil
		})
	}
	req := &rawRequest{addr: n.api, method: sc.method}
	var err error
	if req.target, err = s.expand(sc.target); err != nil {
		return nil, err
	}
	switch sc.who {
	case "admin":
		req.header = append(req.header, "X-API-Key: "+adminKey)
	case "reader":
		req.header = append(req.header, "X-API-Key: "+readerKey)
	case "wrong":
		req.header = append(req.header, "X-API-Key: not-a-key-of-anybody")
	}
	for _, h := range sc.header {
		if h, err = s.expand(h); err != nil {
			return nil, err
		}
		req.header = append(req.header, h)
	}
	if sc.body != nil {
		body, err := s.expand(strings.Join(sc.body, "\n"))
		if err != nil {
			return nil, err
		}
		req.body = []byte(body)
	}
	return req, nil
}

// differences compares an answer with what the case says of it. What placeholders
// catch goes into caught.
func (s *script) differences(sc *scriptCase, req *rawRequest, got *rawAnswer, caught map[string]string) (diffs []string) {
	say := func(format string, args ...any) { diffs = append(diffs, fmt.Sprintf(format, args...)) }
	if got.StatusCode != sc.status {
		say("status is %d, want %d", got.StatusCode, sc.status)
	}
	m := &matcher{known: s.vars, caught: caught}
	for _, line := range sc.expect {
		line, err := s.expand(line)
		if err != nil {
			say("%v", err)
			continue
		}
		f := expectLine.FindStringSubmatch(line)
		name, op, want := f[1], f[2], f[3]
		values, present := got.Header[http.CanonicalHeaderKey(name)]
		switch is := strings.Join(values, ", "); {
		case want == "<absent>":
			if present {
				say("header %s is %q, want none", name, is)
			}
		case op == " ~ ":
			if !regexp.MustCompile(want).MatchString(is) {
				say("header %s is %q, want what matches %q", name, is, want)
			}
		case !present || !m.text(want, is):
			say("header %s is %q, want %q", name, values, want)
		}
	}
	if sc.text != nil {
		want, err := s.expand(strings.Join(sc.text, "\n"))
		if err != nil {
			say("%v", err)
		} else if !m.text(want, string(got.body)) {
			say("body is %q, want %q", clipped(string(got.body)), clipped(want))
		}
	}
	var want any
	if sc.json != "" {
		text, err := s.expand(sc.json)
		if err == nil {
			want, err = decodeJSON([]byte(text))
		}
		if err != nil {
			say("the expected JSON: %v", err)
			return diffs
		}
	}
	if sc.slug != "" && !sc.raw && req.method != "HEAD" {
		want = problemWanted(sc, req, got, want)
	}
	if want == nil {
		return diffs
	}
	is, err := decodeJSON(got.body)
	if err != nil {
		say("the body is not JSON: %v", err)
		return diffs
	}
	if d := cmp.Diff(m.resolve(want, is), is); d != "" {
		say("body (-want +got):\n%s", d)
	}
	if p, _ := is.(map[string]any); sc.detail != "" {
		if detail, _ := p["detail"].(string); !regexp.MustCompile(sc.detail).MatchString(detail) {
			say("detail is %q, want what matches %q", detail, sc.detail)
		}
	}
	return diffs
}

// writeTarget is the path of a thing that can be written.
var writeTarget = regexp.MustCompile(`^/api/v1/(config/[^/]+(/.*)?|namespaces/[^/]+)$`)

// problemWanted is the problem document that the case expects: RFC 9457's members,
// ours, and those in more. A failed write has an outcome; where the path or the method
// is not one of a write, it may have one.
func problemWanted(sc *scriptCase, req *rawRequest, got *rawAnswer, more any) any {
	want := map[string]any{
		"type": "https://confman/errors/" + sc.slug, "title": "<text>", "status": json.Number(strconv.Itoa(sc.status)),
		"detail": "<text>", "instance": "<text>", "correlationId": got.Header.Get("X-Correlation-Id"),
	}
	if sc.slug == "precondition-failed" {
		want["current"] = "<any>"
	}
	path, _, _ := strings.Cut(req.target, "?")
	var p struct{ Outcome string }
	writes := slices.Contains([]string{"PUT", "PATCH", "DELETE"}, req.method)
	sure := writes && writeTarget.MatchString(path) && sc.status != http.StatusMethodNotAllowed
	may := req.method != "GET" && json.Unmarshal(got.body, &p) == nil && p.Outcome != ""
	if sure || may {
		want["outcome"] = "not-applied"
	}
	extra, _ := more.(map[string]any)
	maps.Copy(want, extra)
	return want
}

var (
	correlationForm = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)
	stalenessForm   = regexp.MustCompile(`^(-1|0|[1-9][0-9]*)$`)
)

// ruleBreaks says which of the rules for every answer this one breaks.
func (s *script) ruleBreaks(sc *scriptCase, req *rawRequest, got *rawAnswer) (broken []string) {
	if sc.raw {
		return nil
	}
	say := func(format string, args ...any) { broken = append(broken, fmt.Sprintf(format, args...)) }
	id := got.Header.Get("X-Correlation-Id")
	if !correlationForm.MatchString(id) {
		say("X-Correlation-Id is %q", id)
	}
	if sent, ok := req.value("X-Correlation-Id"); ok && correlationForm.MatchString(sent) != (sent == id) {
		say("X-Correlation-Id is %q after %q was sent", id, sent)
	}
	media := got.Header.Get("Content-Type")
	switch {
	case got.StatusCode >= 400 || got.StatusCode == http.StatusTemporaryRedirect:
		if media != "application/problem+json" {
			say("Content-Type of an error is %q", media)
		}
		if err := checkInstance(req, got); err != nil {
			say("%v", err)
		}
	case sc.json != "" && media != "application/json":
		say("Content-Type of JSON is %q", media)
	}
	if got.StatusCode == http.StatusUnauthorized && got.Header.Get("WWW-Authenticate") == "" {
		say("401 without WWW-Authenticate")
	}
	if got.StatusCode == http.StatusMethodNotAllowed && got.Header.Get("Allow") == "" {
		say("405 without Allow")
	}
	if (req.method == "HEAD" || got.StatusCode == http.StatusNoContent || got.StatusCode == http.StatusNotModified) && len(got.body) > 0 {
		say("a body where there is none: %q", got.body)
	}
	if !strings.HasPrefix(req.target, "/api/") {
		return broken
	}
	if got.Header.Get("Confman-Node") == "" {
		say("no Confman-Node")
	}
	rev, err := strconv.ParseUint(got.Header.Get("Confman-Revision"), 10, 64)
	if err != nil {
		say("Confman-Revision is %q", got.Header.Get("Confman-Revision"))
	} else if rev < s.at[req.addr] {
		say("Confman-Revision went back from %d to %d", s.at[req.addr], rev)
	}
	s.at[req.addr] = max(s.at[req.addr], rev)
	s.seen = max(s.seen, rev)
	if tag, err := strconv.ParseUint(strings.Trim(got.Header.Get("ETag"), `"`), 10, 64); err == nil && tag > rev {
		say("ETag is %d, Confman-Revision only %d", tag, rev)
	}
	var made struct{ Revision uint64 }
	if json.Unmarshal(got.body, &made) == nil && made.Revision > rev { // what is no object has no revision
		say("the body says revision %d, Confman-Revision only %d", made.Revision, rev)
	}
	read := req.method == "GET" || req.method == "HEAD"
	if old := got.Header.Get("Confman-Staleness-Ms"); read && (got.StatusCode == 200 || got.StatusCode == 304) && !stalenessForm.MatchString(old) {
		say("Confman-Staleness-Ms is %q", old)
	}
	return broken
}

// TestInternal: a fault of our own is a line at Error with its cause, and tells the client none of it.
func TestInternal(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	s := newReader(t, w)
	var logged strings.Builder
	s.log = slog.New(slog.NewTextHandler(&logged, nil))
	for _, m := range []struct {
		err         error
		level, slug string
	}{
		{errors.New("open state.db: a cause"), "ERROR", "internal"},
		{fmt.Errorf("get: %w", io.ErrUnexpectedEOF), "ERROR", "internal"},
		{errUnavailable.because("try again"), "INFO", "unavailable"},
		{errNotFound.because("there is no key"), "INFO", "not-found"},
	} {
		logged.Reset()
		rec := httptest.NewRecorder()
		s.newCall(rec, httptest.NewRequest("PUT", keyPath("app", "k"), nil)).finish(m.err)
		a := &answer{rec.Code, rec.Header(), rec.Body.Bytes()}
		if a.slug() != m.slug || m.slug == "internal" && strings.Contains(string(a.body), m.err.Error()) {
			t.Errorf("%v is answered with %v", m.err, a)
		}
		if line := logged.String(); !strings.Contains(line, "level="+m.level) || !strings.Contains(line, m.err.Error()) {
			t.Errorf("%v is logged as %q, want level %s", m.err, line, m.level)
		}
	}
}

// TestAccepts: a client gets the media type that it likes better, and what is usual where it
// does not care.
func TestAccepts(t *testing.T) {
	t.Parallel()
	const want, other = "text/event-stream", "application/json"
	for accept, likes := range map[string]bool{
		"":                                     false,
		"*/*":                                  false,
		want:                                   true,
		other:                                  false,
		want + ", " + other:                    true,
		other + ", " + want:                    false,
		want + ", */*":                         true,
		"*/*, " + want:                         false,
		want + ", */*;q=0.1":                   true,
		"text/*":                               true,
		"text/*;q=0.5, */*;q=0.1":              true,
		"text/html, */*;q=0.8":                 false,
		want + ";q=0.1, " + other:              false,
		other + ";q=0.5, " + want + ";q=0.9":   true,
		want + ";q=0":                          false,
		"*/*;q=0.3, " + want + ";q=0":          false,
		other + ";q=0, */*":                    true,
		"nonsense":                             false,
		"nonsense, " + want + ";charset=utf-8": true,
		want + ";q=x":                          false,
	} {
		c := &call{r: httptest.NewRequest("GET", "/", nil)}
		if accept != "" {
			c.r.Header["Accept"] = strings.SplitAfterN(accept, ", ", 2) // one header or two are the same
		}
		if got := c.accepts(want, other); got != likes {
			t.Errorf("Accept: %s gives a stream: %v, want %v", accept, got, likes)
		}
	}
}

// TestBodyNeverSent: who announces a body and does not send it is answered all the same, soon where
// the body does not matter, and does not hold up the end of the node.
func TestBodyNeverSent(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	n := c.nodes[0]
	for _, m := range []struct {
		head   string
		status int
	}{
		{"GET /health HTTP/1.1\r\nContent-Length: 5\r\n", 400},
		{"PUT " + keyPath("app", "k") + " HTTP/1.1\r\nContent-Length: 5\r\n", 401},
		{"PUT " + keyPath("app", "k") + "?bogus HTTP/1.1\r\nContent-Length: 5\r\nX-API-Key: " + adminKey + "\r\n", 400},
		{"POST " + keyPath("app", "k") + " HTTP/1.1\r\nTransfer-Encoding: chunked\r\n", 405},
		{"PUT /nowhere HTTP/1.1\r\nContent-Length: 200000\r\n", 404},
		{"PUT /a//b HTTP/1.1\r\nContent-Length: 200000\r\n", 400},
	} {
		p := newPending(t, n)
		start := time.Now()
		fmt.Fprintf(p.conn, "%sHost: test\r\n\r\n", m.head)
		p.conn.SetDeadline(time.Now().Add(limit(10 * time.Second)))
		if a, err := p.answer(); err != nil || a.status != m.status {
			t.Errorf("%q: %v, %v after %v, want %d", m.head, a, err, time.Since(start), m.status)
		}
	}
	var open []*pending
	for range 3 {
		p := newPending(t, n)
		fmt.Fprintf(p.conn, "GET /health HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\n")
		open = append(open, p)
	}
	for _, p := range open {
		if _, err := p.answer(); err != nil {
			t.Error(err)
		}
	}
	start := time.Now()
	n.stop()
	if took := time.Since(start); took > limit(4*time.Second) {
		t.Errorf("the node took %v to end", took)
	}
	n.start() // for the checks at the end
	c.ready()
}

// TestSlowBody: a body that takes longer than bodyTime is not waited for.
func TestSlowBody(t *testing.T) {
	long(t)
	t.Parallel()
	c := startCluster(t, 1)
	p := newPending(t, c.nodes[0])
	start := time.Now()
	fmt.Fprintf(p.conn, "PUT %s HTTP/1.1\r\nHost: test\r\nX-API-Key: %s\r\nContent-Length: 1000\r\n\r\n{", keyPath("app", "k"), adminKey)
	p.conn.SetDeadline(start.Add(bodyTime + 15*time.Second))
	a, err := p.answer()
	if took := time.Since(start); err != nil || a.status != http.StatusBadRequest || took < bodyTime {
		t.Errorf("%v, %v after %v", a, err, took)
	}
	if _, err := p.r.ReadByte(); err != io.EOF {
		t.Errorf("the connection goes on: %v", err)
	}
	// The deadline of an answer is over, and the next is not cut for that, nor what net/http says itself.
	p = newPending(t, c.nodes[0])
	for range 2 {
		body := `{"value":"v"}`
		if err := p.send("PUT", keyPath("app", "k"), body, "Expect", "100-continue"); err != nil {
			t.Fatal(err)
		}
		a, err := p.answer()
		if err == nil && a.status == http.StatusContinue {
			a, err = p.answer()
		}
		if err != nil || a.status/100 != 2 {
			t.Fatalf("%v, %v", a, err)
		}
		time.Sleep(writeTime + time.Second)
	}
}

// TestAnswersNotTaken: who asks and asks and takes no answers is cut.
func TestAnswersNotTaken(t *testing.T) {
	long(t)
	t.Parallel()
	c := startCluster(t, 1)
	p := newPending(t, c.nodes[0])
	start := time.Now()
	p.conn.SetDeadline(start.Add(writeTime + 30*time.Second))
	ask := []byte(strings.Repeat("GET /nowhere/"+strings.Repeat("x", 1000)+" HTTP/1.1\r\nHost: test\r\n\r\n", 100))
	var err error
	for err == nil {
		_, err = p.conn.Write(ask)
	}
	if took := time.Since(start); errors.Is(err, os.ErrDeadlineExceeded) || took < writeTime {
		t.Errorf("%v after %v", err, took)
	}
}

// TestConnectionLimits: who sends too much of a head, or too little for too long, on either port, does
// not hold a connection and memory for ever.
func TestConnectionLimits(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	n := c.nodes[0]
	head := func(path string, size int) string { // net/http reads 4 KiB more than the limit, and nodes allow each other 8 KiB more
		return "GET " + path + " HTTP/1.1\r\nHost: test\r\nX-Padding: " + strings.Repeat("x", size) + "\r\n\r\n"
	}
	type limited struct {
		name, addr, sends string
		status            int           // of the answer; 0 where there is none
		cut               time.Duration // when the connection is cut; 0 where that is not waited for
	}
	tests := []limited{
		{"a head of 60 KiB", n.api, head("/health", 60<<10), 200, 0},
		{"a head of more than 64 KiB", n.api, head("/health", 72<<10), 431, 0},
		{"a head of more than 64 KiB and what a node adds", n.raft, head("/term", 96<<10), 431, 0},
		{"half a head", n.api, "GET /health HTTP/1.1\r\nHost: te", 0, 5 * time.Second},
		{"half a head between nodes", n.raft, "GET /term HTTP/1.1\r\nHost: te", 0, 5 * time.Second},
		{"nothing between nodes", n.raft, "", 0, 5 * time.Second},
	}
	if os.Getenv("CONFMAN_LONG") != "" {
		tests = append(tests, limited{"no more requests", n.api, head("/health", 0), 200, 2 * time.Minute},
			limited{"no more questions", n.raft, head("/term", 0), 200, 2 * time.Minute})
	}
	var waits sync.WaitGroup
	for _, m := range tests {
		waits.Go(func() { // all at once: most of them wait
			start := time.Now()
			conn, err := net.Dial("tcp", m.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			conn.SetDeadline(start.Add(m.cut + limit(10*time.Second)))
			io.WriteString(conn, m.sends) // a node that has had enough does not take all of it
			r := bufio.NewReader(conn)
			if m.status != 0 {
				resp, err := http.ReadResponse(r, nil)
				if err == nil && resp.StatusCode != m.status {
					err = errors.New(resp.Status)
				}
				if err != nil {
					t.Errorf("%s: %v, want status %d", m.name, err, m.status)
					return
				}
				io.Copy(io.Discard, resp.Body)
			}
			if m.cut == 0 {
				return
			}
			text, err := io.ReadAll(r)
			if took := time.Since(start); took < m.cut || errors.Is(err, os.ErrDeadlineExceeded) || len(text) > 0 {
				t.Errorf("%s: %q, %v after %v, want the connection cut after %v", m.name, text, err, took, m.cut)
			}
		})
	}
	waits.Wait()
}

// A deadlined answer notes its write deadlines, and whether there is one while it is written.
type deadlined struct {
	*httptest.ResponseRecorder
	deadline  time.Time
	unbounded int // bytes that were written without a deadline
}

func (d *deadlined) SetWriteDeadline(t time.Time) error {
	d.deadline = t
	return nil
}

func (d *deadlined) Write(b []byte) (int, error) {
	if d.deadline.IsZero() {
		d.unbounded += len(b)
	}
	return d.ResponseRecorder.Write(b)
}

// TestWriteDeadline: a client that does not take an answer cannot hold it for ever. That what comes
// next on its connection has a time of its own is in TestSlowBody.
func TestWriteDeadline(t *testing.T) {
	t.Parallel()
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "small", "v"), set("app", "large", strings.Repeat("x", 1<<20)))
	s := newReader(t, w)
	for _, path := range []string{keyPath("app", "small"), keyPath("app", "large"), keyPath("app", "large") + "?raw", "/api/v1/config/app", "/api/v1/audit/app"} {
		r := httptest.NewRequest("GET", path, nil)
		q := r.URL.Query()
		q.Set("stale", "")
		r.URL.RawQuery = q.Encode()
		r.Header.Set("X-API-Key", adminKey)
		d := &deadlined{ResponseRecorder: httptest.NewRecorder()}
		s.ServeHTTP(d, r)
		if d.Code != http.StatusOK || d.unbounded > 0 || time.Until(d.deadline) > 30*time.Second {
			t.Errorf("GET %s: status %d, %d bytes written without a deadline, which is %v afterwards", path, d.Code, d.unbounded, d.deadline)
		}
	}
}

// checkInstance compares the instance of a problem with the path of the request.
// Both are decoded: a URI may be written in more than one way.
func checkInstance(req *rawRequest, got *rawAnswer) error {
	var p struct{ Instance string }
	path, _, _ := strings.Cut(req.target, "?")
	if _, rest, ok := strings.Cut(path, "://"); ok { // an absolute target
		path = rest[strings.Index(rest, "/"):]
	}
	want, err := url.PathUnescape(path)
	if err != nil || !utf8.ValidString(want) || json.Unmarshal(got.body, &p) != nil {
		return nil // no URI can say it; or the document is not JSON, which is said elsewhere
	}
	if is, err := url.PathUnescape(p.Instance); err != nil || is != want {
		return fmt.Errorf("instance is %q, the path was %q", p.Instance, path)
	}
	return nil
}
