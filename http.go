package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"
)

// A server answers the API of one node.
type server struct {
	cfg   *config
	store *store
	node  *raftNode
	auth  atomic.Pointer[auth] // replaced by keepKeys
	log   *slog.Logger
	mux   *http.ServeMux

	stopping  atomic.Int32  // a stage of shutdown, see goodbye
	writes    atomic.Int64  // writes that are being answered
	ending    chan struct{} // closed when waits and streams are to end
	watches   *watches      // the store's
	backups   chan struct{} // a token for each that is sent
	restoring atomic.Bool   // one is read or staged
	crowd     crowd
	refusals  refusals
	tallies   map[*route]*tally
	unknown   atomic.Uint64 // writes that were answered with an unknown outcome
	census    census
	door      *gate // nil where nobody listens
}

// The stages of a shutdown.
const (
	serving    = iota
	draining   // readiness says 503 and so do new writes
	handedOver // new writes are redirected to the new leader
)

// A route is one method of one path. It has no form without a role and a scope, so a route that is
// open to everyone, or to a key that is limited to some namespaces, has to say so.
type route struct {
	method, pattern string
	role            role
	scope           scope
	params          string // the query parameters it takes, separated by spaces
	serve           func(*call) error
}

// reads are the parameters of every read of replicated state.
const reads = " stale consistent"

// routes is every route of the program.
func (s *server) routes() []route {
	return []route{
		{"GET", "/api/v1/config/{ns}/{key...}", reader, oneNamespace, "raw version wait" + reads, s.waits(entrySubject, s.getEntry)},
		{"PUT", "/api/v1/config/{ns}/{key...}", admin, oneNamespace, "raw type", s.putEntry},
		{"DELETE", "/api/v1/config/{ns}/{key...}", admin, oneNamespace, "", s.deleteEntry},
		{"GET", "/api/v1/config/{ns}", reader, oneNamespace, "prefix limit cursor wait" + reads, s.waits(namespaceSubject, s.listEntries)},
		{"PATCH", "/api/v1/config/{ns}", admin, oneNamespace, "", s.patchEntries},
		{"GET", "/api/v1/namespaces", reader, ownNamespaces, "prefix limit cursor" + reads, s.listNamespaces},
		{"GET", "/api/v1/namespaces/{ns}", reader, oneNamespace, "wait" + reads, s.waits(namespaceSubject, s.getNamespace)},
		{"PUT", "/api/v1/namespaces/{ns}", admin, oneNamespace, "", s.putNamespace},
		{"DELETE", "/api/v1/namespaces/{ns}", admin, oneNamespace, "", s.deleteNamespace},
		{"GET", "/api/v1/namespaces/{ns}/keys", reader, oneNamespace, "prefix limit cursor wait" + reads, s.waits(namespaceSubject, s.listKeys)},
		{"GET", "/api/v1/audit/{ns}", reader, oneNamespace, "limit cursor key actor correlationId since" + reads, s.streamed(s.listAudit)},
		{"GET", "/api/v1/audit", admin, wholeStore, "limit cursor key actor correlationId since" + reads, s.streamed(s.listAllAudit)},
		{"GET", "/api/v1/verify", admin, wholeStore, "from to" + reads, s.verify},
		{"GET", "/api/v1/cluster", reader, noNamespace, "", s.getCluster},
		{"PUT", "/api/v1/cluster/nodes/{id}", admin, wholeStore, "force", s.putNode},
		{"DELETE", "/api/v1/cluster/nodes/{id}", admin, wholeStore, "force", s.deleteNode},
		{"POST", "/api/v1/cluster/leader", admin, wholeStore, "", s.moveLeader},
		{"GET", "/api/v1/backup", admin, wholeStore, strings.TrimSpace(reads), s.getBackup},
		{"PUT", "/api/v1/backup", admin, wholeStore, "", s.putBackup},
		{"GET", "/metrics", reader, noNamespace, "", s.metrics},
		{"GET", "/health", public, noNamespace, "", s.health},
		{"GET", "/health/ready", public, noNamespace, "", s.ready},
		{"GET", "/openapi.json", public, noNamespace, "", s.openapi},
		{"GET", "/swagger", public, noNamespace, "", s.swagger},
		{"GET", "/swagger/{file}", public, noNamespace, "", s.swaggerFile},
	}
}

func newServer(cfg *config, st *store, n *raftNode, log *slog.Logger) *server {
	s := &server{cfg: cfg, store: st, node: n, log: log, mux: http.NewServeMux(), ending: make(chan struct{}), watches: &st.watches,
		backups:  make(chan struct{}, maxBackups),
		refusals: refusals{log: log, most: cfg.Limits.AuthFailuresPerMinute}}
	s.auth.Store(newAuth(cfg.Auth.ApiKeys, nil))
	methods := map[string]map[string]*route{}
	var all []*route
	for _, rt := range s.routes() {
		all = append(all, &rt)
		if methods[rt.pattern] == nil {
			methods[rt.pattern] = map[string]*route{}
		}
		methods[rt.pattern][rt.method] = &rt
	}
	s.tallies = newTallies(all)
	for pattern, m := range methods {
		allowed := slices.Collect(maps.Keys(m))
		if m["GET"] != nil {
			allowed = append(allowed, "HEAD")
		}
		slices.Sort(allowed)
		allow := strings.Join(allowed, ", ")
		s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			s.answer(w, r, m, allow)
		})
	}
	// The mux's own 404 is plain text.
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { s.answer(w, r, nil, "") })
	return s
}

// ServeHTTP looks at the path before the mux does: the mux would clean it by a redirect
// that keeps the method, so that a PUT to a//b could land on a/b.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := checkPath(r); err != nil {
		c := s.newCall(w, r)
		defer c.finish(err)
		return
	}
	s.mux.ServeHTTP(w, r)
}

// checkPath refuses what no path of ours can be. An empty last segment is left to the mux.
func checkPath(r *http.Request) error {
	if r.URL.RawPath == "" && plainPath(r.URL.Path) && !strings.Contains(r.URL.RawQuery, "#") {
		return nil
	}
	if strings.Contains(r.RequestURI, "#") {
		return errBadRequest.because("the request target holds a #; write %%23")
	}
	escaped := r.URL.EscapedPath()
	if !strings.HasPrefix(escaped, "/") || !strings.HasPrefix(r.URL.Path, "/") {
		return errBadRequest.because("the request target is not a path")
	}
	if !utf8.ValidString(r.URL.Path) {
		return errBadRequest.because("the path is not UTF-8")
	}
	if strings.ContainsFunc(r.URL.Path, isControl) {
		return errBadRequest.because("the path holds a control character")
	}
	segs := strings.Split(escaped[1:], "/")
	for i, seg := range segs {
		name, err := url.PathUnescape(seg)
		if err != nil || name == "." || name == ".." || name == "" && i < len(segs)-1 {
			return errBadRequest.because("the path has an empty segment, or one that is . or ..")
		}
	}
	return nil
}

// plainPath reports a path, most are, in which there is nothing to look at twice.
func plainPath(p string) bool {
	if p == "" || p[0] != '/' {
		return false
	}
	for i := 1; i < len(p); i++ {
		switch c := p[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
		case (c == '/' || c == '.') && p[i-1] != '/':
		default:
			return false
		}
	}
	return true
}

// isControl reports a C0 or C1 control character.
func isControl(r rune) bool { return unicode.IsControl(r) }

// validNamespace reports whether ns matches [A-Za-z0-9][A-Za-z0-9._-]{0,127}.
func validNamespace(ns string) bool {
	return validID(ns) && ns[0] != '.' && ns[0] != '_' && ns[0] != '-'
}

// A call is one request on its way through the server.
type call struct {
	s       *server
	w       *response
	r       *http.Request
	route   *route // nil where nothing matched
	ns, key string
	q       url.Values
	who     caller
	id      string // correlation id
	start   time.Time
	api     bool   // under /api
	rev     uint64 // revision in the answer, for the log
	reads   bool   // replicated state was read, so the answer says how old it can be
	form    readForm
	since   *time.Time // what was acknowledged before is in what the read sees; nil if that is unknown
	sent    []byte     // the body, once it is read whole
	waiting bool       // ?wait: rather than say that nothing changed, return errUnchanged
	waited  bool       // it took its time because it was asked to
}

// A response remembers the status that went out.
type response struct {
	http.ResponseWriter
	status int
}

func (w *response) WriteHeader(status int) {
	w.begin(status)
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(b []byte) (int, error) {
	w.begin(http.StatusOK)
	return w.ResponseWriter.Write(b)
}

// writeTime is how long a client may take to accept an answer, or a part of a stream. Then it is cut
// off, and what it held is free again.
const writeTime = 30 * time.Second

// begin notes that an answer goes out, and from when its time runs. The server gives the connection's
// next request a time of its own.
func (w *response) begin(status int) {
	if w.status == 0 {
		w.status = status
		http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(writeTime))
	}
}

// Unwrap serves http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (s *server) newCall(w http.ResponseWriter, r *http.Request) *call {
	c := &call{s: s, w: &response{ResponseWriter: w}, r: r, start: time.Now(), id: correlationID(r)}
	h := w.Header()
	h["X-Correlation-Id"] = []string{c.id}
	if r.TransferEncoding != nil {
		// A Content-Length may have stood beside it; net/http has removed it. Whoever is between the client
		// and this node and believes that one sees another end of the request, so nothing follows it (RFC
		// 9112, section 6.1).
		h["Connection"] = []string{"close"}
	}
	if c.api = strings.HasPrefix(r.URL.Path, "/api/") || r.URL.Path == "/api"; c.api {
		h["Confman-Node"] = []string{s.cfg.Cluster.NodeId}
		c.sawRevision(s.store.at().rev)
	}
	return c
}

// validID is what a correlation id may be.
func validID(id string) bool {
	if id == "" || len(id) > 128 {
		return false
	}
	for i := range len(id) {
		c := id[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '_' || c == '-') {
			return false
		}
	}
	return true
}

// correlationID takes the client's id, or makes one.
func correlationID(r *http.Request) string {
	if v := r.Header["X-Correlation-Id"]; len(v) == 1 && validID(v[0]) {
		return v[0]
	}
	return rand.Text()
}

// answer checks a request in the contract's order and serves it.
func (s *server) answer(w http.ResponseWriter, r *http.Request, methods map[string]*route, allow string) {
	c := s.newCall(w, r)
	defer func() {
		if p := recover(); p != nil && p != http.ErrAbortHandler {
			c.finish(fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		} else if p != nil {
			panic(p)
		}
	}()
	c.finish(c.serve(methods, allow))
}

func (c *call) serve(methods map[string]*route, allow string) error {
	r := c.r
	if methods == nil {
		return errNotFound.quoting("there is no route %s", clip(r.URL.Path, 200))
	}
	if c.ns = r.PathValue("ns"); c.ns != "" || strings.Contains(r.Pattern, "{ns}") {
		if !validNamespace(c.ns) {
			return errBadRequest.quoting("%q is not a namespace: [A-Za-z0-9][A-Za-z0-9._-]{0,127}", clip(c.ns, 140))
		}
	}
	if strings.HasSuffix(r.Pattern, "{key...}") {
		c.key = r.PathValue("key")
		if err := checkKey(c.key); err != nil {
			return err
		}
	}
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	if c.route = methods[method]; c.route == nil {
		c.w.Header().Set("Allow", allow)
		return errMethodNotAllowed.because("%s is not for %s; allowed: %s", clip(r.Method, 20), r.Pattern, allow)
	}
	if err := c.identify(); err != nil {
		return c.refuse(err)
	}
	if r.URL.RawQuery != "" {
		if err := c.readQuery(); err != nil {
			return err
		}
	}
	if c.writes() {
		c.s.writes.Add(1)
		defer c.s.writes.Add(-1)
		if done, err := c.s.gate(c); done || err != nil {
			return err
		}
	}
	if c.r.ContentLength != 0 && !c.spools() {
		if err := c.readBody(); err != nil {
			return err
		}
	}
	return c.route.serve(c)
}

// refuse is what becomes of the error of a key. Whoever has the right one is never kept waiting for what
// others try from his address.
func (c *call) refuse(err error) error {
	if problemOf(err).kind != errUnauthorized {
		return err
	}
	if wait := c.s.refusals.failed(c.source()); wait > 0 {
		c.w.Header()["Retry-After"] = []string{strconv.Itoa(int(wait/time.Second) + 1)}
		c.w.Header().Del("WWW-Authenticate")
		return errTooMany.because("too many requests without a right key came from this address; send one with a right key, which is always served")
	}
	return err
}

// writes reports whether the request would change something.
func (c *call) writes() bool {
	return c.r.Method != http.MethodGet && c.r.Method != http.MethodHead
}

// readQuery refuses parameters that the route does not take, so that a typo never
// changes a meaning in silence.
func (c *call) readQuery() (err error) {
	if c.q, err = url.ParseQuery(c.r.URL.RawQuery); err != nil {
		return errBadRequest.because("query: %v", err)
	}
	known := strings.Fields(c.route.params)
	for name, values := range c.q {
		switch {
		case !slices.Contains(known, name):
			return errBadRequest.quoting("unknown query parameter %q; %s takes: %s", clip(name, 60), c.route.pattern, cmp.Or(c.route.params, "none"))
		case len(values) > 1:
			return errBadRequest.because("the query parameter %s is given twice", name)
		case !utf8.ValidString(values[0]):
			return errBadRequest.because("the query parameter %s is not UTF-8", name)
		case slices.Contains(flags, name) && values[0] != "" && values[0] != "true":
			return errBadRequest.because("%s takes no value; leave it out to turn it off", name)
		}
	}
	switch {
	case c.q.Has("stale") && c.q.Has("consistent"):
		return errBadRequest.because("stale and consistent exclude each other")
	case c.q.Has("type") && !c.q.Has("raw"):
		return errBadRequest.because("type goes with raw; in a JSON body it is the member type")
	}
	return nil
}

// flags are the parameters that are there or not.
var flags = []string{"raw", "stale", "consistent", "force"}

// number reads a parameter that is a number, 0 or more.
func (c *call) number(name string, missing uint64) (uint64, error) {
	if !c.q.Has(name) {
		return missing, nil
	}
	n, err := strconv.ParseUint(c.q.Get(name), 10, 64)
	if err != nil {
		return 0, errBadRequest.quoting("%s must be a whole number, not %q", name, clip(c.q.Get(name), 40))
	}
	return n, nil
}

// limit reads how many items a page may have.
func (c *call) limit(usual, most uint64) (int, error) {
	n, err := c.number("limit", usual)
	if err == nil && (n < 1 || n > most) {
		err = errBadRequest.because("limit must be 1 to %d", most)
	}
	return int(n), err
}

// cursor reads where a list goes on; nil is the beginning. Cursors are base64url of a
// letter for the kind of list and the last key that was shown.
func (c *call) cursor(kind byte) ([]byte, error) {
	v := c.q.Get("cursor")
	if v == "" {
		return nil, nil
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(v)
	if err != nil || len(b) == 0 || b[0] != kind || strings.ContainsAny(v, "\r\n") { // base64 skips line ends
		return nil, errBadRequest.because("cursor is not one that this list returned; begin without it")
	}
	return b[1:], nil
}

func cursorOf(kind byte, at []byte) string {
	return base64.RawURLEncoding.EncodeToString(append([]byte{kind}, at...))
}

// accepts reports whether the client would rather have media type want than other (RFC 9110,
// section 12.5.1). Of two that it likes alike it gets the one that it names first, and other
// where it names neither.
func (c *call) accepts(want, other string) bool {
	type liking struct {
		q         float64
		precision int // of the range that says so: 1 */*, 2 text/*, 3 text/plain
		place     int
	}
	var likes [2]liking
	for i, part := range strings.Split(strings.Join(c.r.Header["Accept"], ","), ",") {
		t, params, err := mime.ParseMediaType(part)
		if err != nil {
			continue
		}
		q, err := strconv.ParseFloat(cmp.Or(params["q"], "1"), 64)
		if err != nil {
			continue
		}
		for j, of := range []string{want, other} {
			major, _, _ := strings.Cut(of, "/")
			precision := 1 + slices.Index([]string{"*/*", major + "/*", of}, t)
			if precision > likes[j].precision {
				likes[j] = liking{q, precision, i}
			}
		}
	}
	w, o := likes[0], likes[1]
	return w.q > o.q || w.q == o.q && w.q > 0 && w.place < o.place
}

// bodyTime is how long a client may take to send a body.
const bodyTime = 30 * time.Second

// unwantedTime is how long a body is waited for that nobody needs: that of a read, and what is left
// of one that is refused, of which net/http reads some before it answers.
const unwantedTime = time.Second

// readBody reads the whole body. That of a read means nothing, but it is in the way of noticing that
// the client goes away.
func (c *call) readBody() error {
	maxBody := int64(c.s.cfg.Limits.MaxBodyBytes)
	if c.r.ContentLength > maxBody {
		return errTooLarge.because("the body has %d bytes; at most %d are allowed", c.r.ContentLength, maxBody)
	}
	rc := http.NewResponseController(c.w)
	most := bodyTime
	if !c.writes() {
		most = unwantedTime
	}
	rc.SetReadDeadline(c.start.Add(most))
	body, b, err := http.MaxBytesReader(c.w, c.r.Body, maxBody), []byte{}, error(nil)
	if c.writes() {
		b, err = io.ReadAll(body)
	} else {
		_, err = io.Copy(io.Discard, body)
	}
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return errTooLarge.because("the body has more than %d bytes", maxBody)
	}
	if err != nil {
		return errBadRequest.because("the body did not arrive whole within %v: %v", most, err)
	}
	rc.SetReadDeadline(time.Time{})
	c.sent = b
	if c.r.Header["Content-Encoding"] != nil {
		return errUnsupportedMediaType.because("Content-Encoding is not supported; send the body as it is")
	}
	return nil
}

// rawBody reports whether the bytes of the body are the value, by their media type. Any
// other type is taken for JSON, whatever curl -d says it is.
func (c *call) rawBody() bool {
	t, _, _ := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	return t == "text/plain" || t == "application/octet-stream"
}

// object reads a body that must be a JSON object.
func (c *call) object() ([]member, error) {
	b := c.sent
	if c.rawBody() {
		return nil, errUnsupportedMediaType.because("%s takes JSON only; send it as application/json", c.route.pattern)
	}
	if err := checkJSON(b); err != nil {
		return nil, errBadRequest.quoting("body: %v", err)
	}
	ms, err := objectMembers(b)
	if err != nil {
		return nil, errBadRequest.quoting("body: %v", err)
	}
	return ms, nil
}

func unknownMember(name, known string) error {
	return errBadRequest.quoting("body: unknown member %q; known: %s", clip(name, 60), known)
}

// buffers holds what answers are put together in.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 1024); return &b }}

func getBuffer() *[]byte { return buffers.Get().(*[]byte) }

// putBuffer takes a buffer back; one that grew large is left to the collector.
func putBuffer(b *[]byte) {
	if cap(*b) <= 1<<16 {
		*b = (*b)[:0]
		buffers.Put(b)
	}
}

var (
	typeJSON    = []string{"application/json"}
	typeProblem = []string{"application/problem+json"}
	typeText    = []string{"text/plain; charset=utf-8"}
)

// setETag says which revision made the thing that is answered.
func (c *call) setETag(rev uint64) {
	c.w.Header()["Etag"] = []string{`"` + strconv.FormatUint(rev, 10) + `"`}
}

// sawRevision makes the answer's Confman-Revision at least rev.
func (c *call) sawRevision(rev uint64) {
	if c.api && (rev > c.rev || c.rev == 0) {
		c.rev = rev
		c.w.Header()["Confman-Revision"] = []string{strconv.FormatUint(rev, 10)}
	}
}

// sendJSON answers with b and a line feed behind it.
func (c *call) sendJSON(status int, b []byte) error {
	if err := c.showStaleness(); err != nil {
		return err
	}
	b = append(b, '\n')
	h := c.w.Header()
	h["Content-Type"] = typeJSON
	h["Content-Length"] = []string{strconv.Itoa(len(b))}
	c.w.WriteHeader(status)
	return c.write(b)
}

// write sends the body of an answer.
func (c *call) write(b []byte) error {
	if _, err := c.w.Write(b); err != nil {
		return errClosed.because("%v", err)
	}
	return nil
}

// sendText answers with b as it is.
func (c *call) sendText(b []byte) error {
	if err := c.showStaleness(); err != nil {
		return err
	}
	h := c.w.Header()
	h["Content-Type"] = typeText
	h["X-Content-Type-Options"] = []string{"nosniff"} // a value may look like a page
	h["Content-Length"] = []string{strconv.Itoa(len(b))}
	return c.write(b)
}

// sendNothing answers with a status that has no body.
func (c *call) sendNothing(status int) error {
	if err := c.showStaleness(); err != nil {
		return err
	}
	c.w.WriteHeader(status)
	return nil
}

// finish is the only place where an error becomes a response and the only place where
// a request is logged and counted.
func (c *call) finish(err error) {
	if err == nil {
		c.observe(cmp.Or(c.w.status, http.StatusOK), nil)
		return
	}
	p := problemOf(err)
	if c.reads && c.w.status == 0 && p.kind != errInternal {
		// That nothing is there is an answer too, and may be no older than any other.
		if stale := c.showStaleness(); stale != nil {
			p, err = problemOf(stale), stale
		}
	}
	if errors.Is(err, errCorrupt) {
		go c.s.node.halt(fmt.Errorf("%w; %s", err, rebuildState))
	}
	c.observe(cmp.Or(c.w.status, p.kind.status), err) // the log gets all of err, the client gets p
	if c.w.status != 0 {
		// Half an answer is out. Cut the line, so that the client sees a broken response and
		// does not take it for a short one.
		panic(http.ErrAbortHandler)
	}
	doc := problemDocument{
		Type: "https://confman/errors/" + p.kind.slug, Title: p.kind.title, Status: p.kind.status, Detail: p.detail,
		Instance: c.r.URL.EscapedPath(), CorrelationID: c.id,
	}
	if p.kind == errPrecondition {
		cur, _ := json.Marshal(p.current) // numbers and strings: cannot fail
		doc.Current = cur
	}
	if c.writes() {
		doc.Outcome = cmp.Or(p.kind.outcome, "not-applied")
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.Encode(doc)
	h := c.w.Header()
	if s := p.kind.status; (s == http.StatusServiceUnavailable || s == http.StatusTooManyRequests) && h["Retry-After"] == nil {
		h["Retry-After"] = []string{"1"}
	}
	if c.r.ContentLength != 0 && c.sent == nil {
		http.NewResponseController(c.w).SetReadDeadline(time.Now().Add(unwantedTime))
		if c.r.ContentLength > int64(c.s.cfg.Limits.MaxBodyBytes) {
			h["Connection"] = []string{"close"} // rather than read what is refused
		}
	}
	h.Del("ETag")
	h["Content-Type"] = typeProblem
	h["Content-Length"] = []string{strconv.Itoa(b.Len())}
	c.w.WriteHeader(p.kind.status)
	c.w.Write(b.Bytes())
}

// slow is from when on a read that went well is worth a line in the log.
const slow = 100 * time.Millisecond

// observe counts a request and logs it: writes, refusals, errors and slow ones at Info.
func (c *call) observe(status int, err error) {
	took := time.Since(c.start)
	c.s.count(c, status, took, err)
	level := slog.LevelDebug
	switch {
	case err != nil && problemOf(err).kind == errInternal:
		level = slog.LevelError
	case err != nil, c.writes(), took > slow && !c.waited:
		level = slog.LevelInfo
	}
	// Whoever has no right key, an expired one included, or asks for what his does not allow, fills no log, by
	// being slow either.
	quiet := c.who.principal == ""
	if err != nil {
		k := problemOf(err).kind
		c.s.refusals.count(k)
		quiet = quiet || k == errUnauthorized || k == errForbidden || k == errTooMany
	}
	if quiet && level == slog.LevelInfo && !c.s.refusals.logged(c.source()) {
		level = slog.LevelDebug
	}
	ctx := context.Background()
	if !c.s.log.Enabled(ctx, level) {
		return
	}
	name := "none"
	if c.route != nil {
		name = c.route.pattern
	}
	attrs := make([]slog.Attr, 0, 10)
	attrs = append(attrs, slog.String("method", clip(c.r.Method, 20)), slog.String("route", name), slog.Int("status", status),
		slog.Duration("duration", took), slog.String("correlationId", c.id), slog.String("principal", c.who.principal),
		slog.Uint64("revision", c.rev), slog.String("source", c.source()))
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	c.s.log.LogAttrs(ctx, level, "request", attrs...)
}
