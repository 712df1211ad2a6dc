package main

// openapi.json is what other programs are written against, so every answer that these tests get is held
// against it: by do and its like, the scripts, streams and raw connections. An answer that the document
// does not allow is the error of the request; and because some tests expect requests to fail, it also
// fails the run as a whole, see TestMain.
//
// To add a route, add its path to openapi.json: the tests below say what is missing.

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
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
	"sync/atomic"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/pb33f/jsonschema/v6"
	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
)

// A document is openapi.json, compiled once for the process.
type document struct {
	doc     map[string]any
	schemas *jsonschema.Compiler
	paths   []*docPath
	// What is answered outside of the operations.
	noRoute, badPath, methodNotAllowed *described
	event                              *jsonschema.Schema
	events                             atomic.Int64
}

// A docPath is a path of the document.
type docPath struct {
	path       string
	segments   []string
	operations map[string]*operation // by method, HEAD too
}

// An operation is a method of a path.
type operation struct {
	name    string // "GET /api/v1/namespaces"
	answers map[int]*described
}

// A described is what the document says of an operation's answers with one status.
type described struct {
	headers  map[string]*jsonschema.Schema
	required []string
	media    map[string]*media // none where there is no body
	seen     *atomic.Int64
}

// A media is a body in one media type.
type media struct {
	schema *jsonschema.Schema
	seen   atomic.Int64
}

// Status, names of headers and media type of every answer are checked. What costs more, the bodies and the
// values of headers, is checked of the first answers of each operation, status and media type, and then of
// one in sampled: load tests get the same answer ten thousand times.
const (
	firstAnswers = 50
	sampled      = 100
	largeBody    = 64 << 10 // of which firstLarge are checked, for they take as long as a thousand others
	firstLarge   = 5
)

// docURL names the document where a schema is named.
const docURL = "https://confman/openapi.json"

// apiDocument is the document as this process checks by it.
var apiDocument = sync.OnceValue(func() *document {
	d, err := newDocument(openapiJSON)
	if err != nil {
		panic(err) // nothing can be tested
	}
	return d
})

// newDocument compiles an OpenAPI document.
func newDocument(text []byte) (*document, error) {
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	d := &document{doc: doc.(map[string]any), schemas: jsonschema.NewCompiler()}
	d.schemas.DefaultDraft(jsonschema.Draft2020)
	d.schemas.AssertFormat()
	if err := d.schemas.AddResource(docURL, doc); err != nil {
		return nil, err
	}
	paths, _ := d.at("/paths")
	for path, item := range paths.(map[string]any) {
		p := &docPath{path: path, segments: strings.Split(path, "/")[1:], operations: map[string]*operation{}}
		d.paths = append(d.paths, p)
		for method := range item.(map[string]any) {
			if method == "parameters" {
				continue
			}
			op := &operation{strings.ToUpper(method) + " " + path, map[int]*described{}}
			p.operations[strings.ToUpper(method)] = op
			at := "/paths/" + pointer(path) + "/" + method + "/responses"
			all, _ := d.at(at)
			for status := range all.(map[string]any) {
				code, err := strconv.Atoi(status)
				if err != nil {
					return nil, fmt.Errorf("%s: status %q", op.name, status)
				}
				if op.answers[code], err = d.describe(at + "/" + status); err != nil {
					return nil, err
				}
			}
			if method == "get" {
				p.operations["HEAD"] = op.head()
			}
		}
	}
	for name, to := range map[string]**described{"NoRoute": &d.noRoute, "BadPath": &d.badPath, "MethodNotAllowed": &d.methodNotAllowed} {
		if *to, err = d.describe("/components/responses/" + name); err != nil {
			return nil, err
		}
	}
	d.event, err = d.schemas.Compile(docURL + "#/components/schemas/Event")
	return d, err
}

// head is what HEAD is answered where op is GET: the same without a body.
func (op *operation) head() *operation {
	h := &operation{"HEAD" + strings.TrimPrefix(op.name, "GET"), map[int]*described{}}
	for status, a := range op.answers {
		h.answers[status] = &described{a.headers, a.required, a.media, new(atomic.Int64)}
	}
	return h
}

// pointer escapes a segment of a JSON pointer.
func pointer(segment string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(segment)
}

// at finds what a JSON pointer, or what it refers to, leads to, and where that really stands.
func (d *document) at(ptr string) (any, string) {
	var v any = d.doc
	for seg := range strings.SplitSeq(ptr[1:], "/") {
		m, _ := v.(map[string]any)
		v = m[strings.NewReplacer("~1", "/", "~0", "~").Replace(seg)]
	}
	if m, ok := v.(map[string]any); ok && len(m) == 1 {
		if ref, ok := m["$ref"].(string); ok {
			return d.at(strings.TrimPrefix(ref, "#"))
		}
	}
	return v, ptr
}

// describe compiles the response at ptr.
func (d *document) describe(ptr string) (*described, error) {
	v, ptr := d.at(ptr)
	if v == nil {
		return nil, fmt.Errorf("openapi.json has no %s", ptr)
	}
	a := &described{map[string]*jsonschema.Schema{}, nil, map[string]*media{}, new(atomic.Int64)}
	headers, _ := v.(map[string]any)["headers"].(map[string]any)
	for name := range headers {
		h, at := d.at(ptr + "/headers/" + name)
		sch, err := d.compile(at + "/schema")
		if err != nil {
			return nil, err
		}
		name = http.CanonicalHeaderKey(name)
		a.headers[name] = sch
		if h.(map[string]any)["required"] == true {
			a.required = append(a.required, name)
		}
	}
	content, _ := v.(map[string]any)["content"].(map[string]any)
	for name := range content {
		sch, err := d.compile(ptr + "/content/" + pointer(name) + "/schema")
		if err != nil {
			return nil, err
		}
		a.media[name] = &media{schema: sch}
	}
	return a, nil
}

func (d *document) compile(ptr string) (*jsonschema.Schema, error) {
	return d.schemas.Compile(docURL + "#" + ptr)
}

// path finds the path of the document that a request target is of, nil for none. It is as strict as the
// document: what the program does not clean is not cleaned here. A key's / may be escaped or not.
func (d *document) path(target string) *docPath {
	if _, rest, ok := strings.Cut(target, "://"); ok { // an absolute target
		target = rest[max(strings.Index(rest, "/"), 0):]
	}
	target, _, _ = strings.Cut(target, "?")
	if !strings.HasPrefix(target, "/") {
		return nil
	}
	segs := strings.Split(target[1:], "/")
	for i := range segs {
		if name, err := url.PathUnescape(segs[i]); err == nil {
			segs[i] = name
		}
	}
	var found *docPath
	literals := -1 // in found; /namespaces/{ns}/keys rather than what would take keys for a name
	for _, p := range d.paths {
		if n := p.match(segs); n > literals {
			found, literals = p, n
		}
	}
	return found
}

// match returns how many literal segments of p are in segs, -1 if segs are not of p.
func (p *docPath) match(segs []string) (literals int) {
	last := p.segments[len(p.segments)-1]
	if len(segs) < len(p.segments) || len(segs) > len(p.segments) && last != "{key}" {
		return -1
	}
	for i, want := range p.segments {
		switch {
		case want[0] != '{':
			if segs[i] != want {
				return -1
			}
			literals++
		case want != "{key}" && segs[i] == "":
			return -1
		}
	}
	return literals
}

// ofHTTP are headers that the document leaves to HTTP; Content-Type is checked as the media type.
var ofHTTP = []string{"Connection", "Content-Length", "Content-Type", "Date", "Transfer-Encoding"}

// beforeUs are the statuses with which net/http refuses what is no request.
var beforeUs = []int{400, 417, 431, 501, 505}

// check says what of an answer the document does not allow.
func (d *document) check(method, target string, a *answer) error {
	if a.status < 200 {
		return nil // the answer is still to come
	}
	kind, _, err := mime.ParseMediaType(cmp.Or(a.header.Get("Content-Type"), "-/-"))
	if err != nil {
		return fmt.Errorf("Content-Type %q: %v", a.header.Get("Content-Type"), err)
	}
	if a.header["X-Correlation-Id"] == nil && (kind == "text/plain" || kind == "-/-") && slices.Contains(beforeUs, a.status) {
		return nil
	}
	if a.header["X-Correlation-Id"] == nil && (target == "/term" || target == "/applied") {
		return nil // what nodes ask each other, on another port
	}
	p := d.path(target)
	var is *described
	switch {
	case p == nil:
		is = map[int]*described{400: d.badPath, 404: d.noRoute}[a.status]
	case p.operations[method] == nil:
		is = map[int]*described{400: d.badPath, 405: d.methodNotAllowed}[a.status]
	default:
		is = p.operations[method].answers[a.status]
	}
	if is == nil {
		return fmt.Errorf("status %d is not documented", a.status)
	}
	is.seen.Add(1)
	for _, name := range is.required {
		if a.header[name] == nil {
			return fmt.Errorf("the header %s is missing", name)
		}
	}
	for name := range a.header {
		if is.headers[name] == nil && !slices.Contains(ofHTTP, name) {
			return fmt.Errorf("the header %s is not documented", name)
		}
	}
	if len(is.media) == 0 {
		if len(a.body) > 0 || kind != "-/-" {
			return fmt.Errorf("a body of type %s where none is documented: %.200q", kind, a.body)
		}
		return d.values(is, a)
	}
	m := is.media[kind]
	if m == nil {
		return fmt.Errorf("a body of type %s is not documented", kind)
	}
	n := m.seen.Add(1)
	if n > firstAnswers && n%sampled != 0 || n > firstLarge && len(a.body) > largeBody {
		return nil
	}
	if err := d.values(is, a); err != nil {
		return err
	}
	var body any = string(a.body)
	switch {
	case method == http.MethodHead:
		if len(a.body) > 0 {
			return errors.New("a body behind HEAD")
		}
		return nil
	case strings.HasSuffix(kind, "json"):
		if body, err = jsonschema.UnmarshalJSON(bytes.NewReader(a.body)); err != nil {
			return fmt.Errorf("the body is not JSON: %v", err)
		}
	}
	if err := m.schema.Validate(body); err != nil {
		return fmt.Errorf("the body: %v", err)
	}
	return nil
}

// values checks the values of headers.
func (d *document) values(is *described, a *answer) error {
	for name, sch := range is.headers {
		if v := a.header[name]; v != nil {
			if err := sch.Validate(strings.Join(v, ", ")); err != nil {
				return fmt.Errorf("the header %s: %v", name, err)
			}
		}
	}
	return nil
}

// undocumented are the answers of this process that the document does not allow.
var undocumented struct {
	sync.Mutex // guards all
	all        []error
}

// documented checks an answer that a test got. The error is for the test; TestMain has it too.
func documented(method, target string, a *answer) error {
	return noted(method, target, a.status, apiDocument().check(method, target, a))
}

// documentedEvent checks the data of an event of a stream.
func documentedEvent(data string) error {
	d := apiDocument()
	if n := d.events.Add(1); n > firstAnswers && n%sampled != 0 {
		return nil
	}
	v, err := jsonschema.UnmarshalJSON(strings.NewReader(data))
	if err == nil {
		err = d.event.Validate(v)
	}
	return noted("GET", "an event", 200, err)
}

func noted(method, target string, status int, err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("not as openapi.json says: %s %s: %d: %w", method, clip(target, 200), status, err)
	undocumented.Lock()
	defer undocumented.Unlock()
	if len(undocumented.all) < 20 {
		undocumented.all = append(undocumented.all, err)
	}
	return err
}

// TestOpenAPIRoutes: the document has the routes of the program and no other, with their parameters, and
// says who may use them.
func TestOpenAPIRoutes(t *testing.T) {
	t.Parallel()
	d := apiDocument()
	type row struct {
		Params, Security string
		Forbids          bool
	}
	are, said := map[string]row{}, map[string]row{}
	for _, rt := range (&server{}).routes() {
		name := rt.method + " " + strings.Replace(rt.pattern, "{key...}", "{key}", 1)
		names := strings.Fields(rt.params)
		for _, m := range regexp.MustCompile(`\{(\w+)`).FindAllStringSubmatch(rt.pattern, -1) {
			names = append(names, "path "+m[1])
		}
		slices.Sort(names)
		are[name] = row{strings.Join(names, ", "), map[bool]string{true: "[]", false: `[{"ApiKey":[]},{"Bearer":[]}]`}[rt.role == public],
			rt.role == admin || rt.role != public && (rt.scope == wholeStore || rt.scope == oneNamespace)}
	}
	for _, p := range d.paths {
		item := "/paths/" + pointer(p.path)
		for method, op := range p.operations {
			if method == "HEAD" {
				continue
			}
			at := item + "/" + strings.ToLower(method)
			var names []string
			for _, list := range []string{item + "/parameters", at + "/parameters"} {
				all, _ := d.at(list)
				params, _ := all.([]any)
				for _, param := range params {
					m := param.(map[string]any)
					if ref, ok := m["$ref"].(string); ok {
						v, _ := d.at(strings.TrimPrefix(ref, "#"))
						m = v.(map[string]any)
					}
					switch name := m["name"].(string); m["in"] {
					case "query":
						names = append(names, name)
					case "path":
						names = append(names, "path "+name)
					}
				}
			}
			slices.Sort(names)
			security, _ := d.at(at + "/security")
			text, err := json.Marshal(security)
			if err != nil {
				t.Fatal(err)
			}
			_, forbids := op.answers[403]
			said[op.name] = row{strings.Join(names, ", "), string(text), forbids}
			_, denies := op.answers[401]
			if denies != (string(text) != "[]") {
				t.Errorf("%s: security is %s, and 401 is documented: %v", op.name, text, denies)
			}
		}
	}
	if diff := gocmp.Diff(are, said); diff != "" {
		t.Errorf("routes (-program +document):\n%s", diff)
	}
}

// TestOpenAPIHeaders: the headers that the program reads are in the document.
func TestOpenAPIHeaders(t *testing.T) {
	t.Parallel()
	are := map[string]bool{}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`\br\.Header(?:\[|\.Get\(|\.Values\()"([^"]+)"`).FindAllSubmatch(text, -1) {
			are[string(m[1])] = true
		}
	}
	said := map[string]bool{
		// These are security schemes.
		"X-Api-Key": true, "Authorization": true,
		// These are the media types of answers and bodies.
		"Accept": true, "Content-Type": true,
		// These are in the text.
		"Accept-Encoding": true, "Content-Encoding": true, "X-Forwarded-For": true,
	}
	d := apiDocument()
	params, _ := d.at("/components/parameters")
	for _, p := range params.(map[string]any) {
		if p := p.(map[string]any); p["in"] == "header" {
			said[http.CanonicalHeaderKey(p["name"].(string))] = true
		}
	}
	if diff := gocmp.Diff(are, said); diff != "" {
		t.Errorf("headers of requests (-program +document):\n%s", diff)
	}
	// Each parameter, header, response and schema is used somewhere.
	for _, kind := range []string{"parameters", "headers", "responses", "schemas", "securitySchemes"} {
		all, _ := d.at("/components/" + kind)
		for name := range all.(map[string]any) {
			ref := fmt.Sprintf(`"#/components/%s/%s"`, kind, name)
			if kind == "securitySchemes" {
				ref = fmt.Sprintf(`{"%s": []}`, name)
			}
			if !bytes.Contains(openapiJSON, []byte(ref)) && !slices.Contains([]string{"NoRoute", "BadPath", "MethodNotAllowed"}, name) {
				t.Errorf("nothing uses components/%s/%s", kind, name)
			}
		}
	}
}

// TestOpenAPIProblems: the document has the kinds of problem of the program with their statuses, and no other.
func TestOpenAPIProblems(t *testing.T) {
	t.Parallel()
	var said []string
	for _, m := range regexp.MustCompile(`https://confman/errors/([a-z-]+)"`).FindAllSubmatch(openapiJSON, -1) {
		said = append(said, string(m[1]))
	}
	var are []string
	for _, r := range rows(chapter(t, "API"), `\d{3}`) { // which TestManualProblems holds against the program
		are = append(are, strings.Trim(r[1], "`"))
	}
	slices.Sort(are)
	slices.Sort(said)
	if diff := gocmp.Diff(are, slices.Compact(said)); diff != "" {
		t.Errorf("problems (-program +document):\n%s", diff)
	}
}

// TestOpenAPIValid: the document is OpenAPI 3.1.
func TestOpenAPIValid(t *testing.T) {
	t.Parallel()
	doc, err := libopenapi.NewDocument(openapiJSON)
	if err != nil {
		t.Fatal(err)
	}
	v, errs := validator.NewValidator(doc)
	if len(errs) > 0 {
		t.Fatal(errors.Join(errs...))
	}
	if ok, found := v.ValidateDocument(); !ok {
		for _, e := range found {
			t.Errorf("%s: %s: %+v", e.Message, e.Reason, e.SchemaValidationErrors)
		}
	}
	ids := map[string]bool{}
	for _, m := range regexp.MustCompile(`"operationId": "(\w+)"`).FindAllSubmatch(openapiJSON, -1) {
		if ids[string(m[1])] {
			t.Errorf("two operations are called %s", m[1])
		}
		ids[string(m[1])] = true
	}
}

// TestOpenAPIRefuses: the check is one. It takes an answer of the program as it is and refuses it with any
// one thing changed.
func TestOpenAPIRefuses(t *testing.T) {
	t.Parallel()
	d, err := newDocument(openapiJSON)
	if err != nil {
		t.Fatal(err)
	}
	w := newWriter(t, t.TempDir())
	w.apply(set("app", "k", "v"))
	s := newReader(t, w)
	ask := func(method, target, key string) *answer {
		r, rec := httptest.NewRequest(method, target, nil), httptest.NewRecorder()
		r.Header.Set("X-API-Key", key)
		s.ServeHTTP(rec, r)
		if method == http.MethodHead {
			rec.Body.Reset() // net/http does it
		}
		return &answer{rec.Code, rec.Header(), rec.Body.Bytes()}
	}
	const entry, ready, none = "/api/v1/config/app/%6b?stale", "/health/ready", "/nowhere"
	header := func(name, value string) func(*answer) {
		return func(a *answer) {
			if a.header.Del(name); value != "" {
				a.header.Set(name, value)
			}
		}
	}
	body := func(old, new string) func(*answer) {
		return func(a *answer) {
			changed := strings.Replace(string(a.body), old, new, 1)
			if changed == string(a.body) {
				t.Errorf("%q is not in %s", old, a.body)
			}
			a.body = []byte(changed)
		}
	}
	status := func(n int) func(*answer) { return func(a *answer) { a.status = n } }
	for _, m := range []struct {
		method, target, key string
		what, says          string
		change              func(*answer)
	}{
		{"GET", entry, adminKey, "another member", "additional properties", body(`{`, `{"more":1,`)},
		{"GET", entry, adminKey, "a missing member", "missing property", body(`"type":"string",`, ``)},
		{"GET", entry, adminKey, "a value of another kind", "want string", body(`"value":"v"`, `"value":1`)},
		{"GET", entry, adminKey, "a time of another form", "date-time", body(`"updatedAt":"`, `"updatedAt":"on `)},
		{"GET", entry, adminKey, "no JSON", "not JSON", body(`}`, ``)},
		{"GET", entry, adminKey, "another status", "status 202", status(202)},
		{"GET", entry, adminKey, "a status of another body", "type application/json", func(a *answer) {
			a.status = 404
			a.header.Del("ETag")
			a.header.Del("Vary")
		}},
		{"GET", entry, adminKey, "a status without a body", "none is documented", status(304)},
		{"GET", entry, adminKey, "no tag", "Etag is missing", header("ETag", "")},
		{"GET", entry, adminKey, "a weak tag", "header Etag", header("ETag", `W/"1"`)},
		{"GET", entry, adminKey, "no node", "Confman-Node is missing", header("Confman-Node", "")},
		{"GET", entry, adminKey, "no revision", "Confman-Revision is missing", header("Confman-Revision", "")},
		{"GET", entry, adminKey, "no age", "Confman-Staleness-Ms is missing", header("Confman-Staleness-Ms", "")},
		{"GET", entry, adminKey, "no id", "X-Correlation-Id is missing", header("X-Correlation-Id", "")},
		{"GET", entry, adminKey, "another header", "Confman-Other is not documented", header("Confman-Other", "1")},
		{"GET", entry, adminKey, "another type", "type text/html", header("Content-Type", "text/html")},
		{"GET", entry, adminKey, "no type", "type -/-", header("Content-Type", "")},
		{"HEAD", entry, adminKey, "another header", "Confman-Other is not documented", header("Confman-Other", "1")},
		{"HEAD", entry, adminKey, "another status", "status 202", status(202)},
		{"GET", entry, "", "a problem of another kind", "value must be", body(`errors/unauthorized`, `errors/forbidden`)},
		{"GET", entry, "", "a problem without a kind", "missing property", body(`"type":"https://confman/errors/unauthorized",`, ``)},
		{"GET", entry, "", "an outcome of a read", "outcome", body(`{`, `{"outcome":"not-applied",`)},
		{"GET", entry, "", "no challenge", "Www-Authenticate is missing", header("WWW-Authenticate", "")},
		{"GET", entry, "", "another status than the problem's", "value must be", func(a *answer) {
			a.status = 403
			a.header.Del("WWW-Authenticate")
		}},
		{"DELETE", entry, "", "no outcome of a write", "missing property 'outcome'", body(`,"outcome":"not-applied"`, ``)},
		{"DELETE", entry, "", "another outcome of a write", "value must be", body(`"outcome":"not-applied"`, `"outcome":"unknown"`)},
		{"GET", "/api/v1/config/app?stale", adminKey, "another member within", "additional properties", body(`"items":[{`, `"items":[{"more":1,`)},
		{"GET", "/api/v1/audit/app?stale", adminKey, "another action", "must be one of", body(`config.set`, `config.get`)},
		{"GET", "/openapi.json", "", "no policy", "Content-Security-Policy is missing", header("Content-Security-Policy", "")},
		{"GET", ready, "", "a reason to be ready", "", func(a *answer) { a.status = 200 }},
		{"GET", none, "", "a status of no route", "status 200", status(200)},
		{"POST", entry, adminKey, "no Allow", "Allow is missing", header("Allow", "")},
		{"POST", entry, adminKey, "another status for a method", "status 404", status(404)},
	} {
		a := ask(m.method, m.target, m.key)
		if err := d.check(m.method, m.target, a); err != nil {
			t.Errorf("%s %s: %v (%v, %v)", m.method, m.target, err, a, a.header)
			continue
		}
		m.change(a)
		if err := d.check(m.method, m.target, a); err == nil || !strings.Contains(err.Error(), m.says) {
			t.Errorf("%s %s with %s: %v, want an error that says %q", m.method, m.target, m.what, err, m.says)
		}
	}
}

// TestOpenAPISamples: of many equal answers most are not looked into, but none escapes by that for long.
func TestOpenAPISamples(t *testing.T) {
	t.Parallel()
	d, err := newDocument(openapiJSON)
	if err != nil {
		t.Fatal(err)
	}
	good := &answer{200, http.Header{"Content-Type": {"application/json"}, "X-Correlation-Id": {"x"}}, []byte(`{"status":"healthy"}`)}
	bad := &answer{200, good.header, []byte(`{"status":"ill"}`)}
	refused := 0
	for range firstAnswers {
		if err := d.check("GET", "/health", good); err != nil {
			t.Fatal(err)
		}
	}
	for range 10 * sampled {
		if d.check("GET", "/health", bad) != nil {
			refused++
		}
	}
	if refused != 10 {
		t.Errorf("%d of %d were refused", refused, 10*sampled)
	}
}

// filled has something for each parameter of a path.
var filled = strings.NewReplacer("{ns}", "app", "{key}", "k", "{file}", "page.js", "{id}", "node9")

// makeRefusals makes each operation refuse in each documented way that all of them have in common.
func (d *document) makeRefusals(t *testing.T, c *cluster) {
	leader, follower := c.leader(), c.followers()[0]
	for _, m := range []struct { // what no script can say
		method, target, body string
		status               int
	}{
		{"GET", "/api/v1/cluster", "", 200},
		{"POST", "/api/v1/cluster/leader", `{"node":"` + leader.id + `"}`, 200},
		{"PUT", "/api/v1/backup", "no backup", 422},
	} {
		if a, err := do(m.method, leader.url+m.target, adminKey, m.body); err != nil || a.status != m.status {
			t.Errorf("%s %s: %v, %v, want %d", m.method, m.target, a, err, m.status)
		}
	}
	const limited = "cm_test_outside_Vb7kQm2xTn5wRz"
	s := newReader(t, newWriter(t, t.TempDir()))
	s.setKeys([]apiKey{{Key: adminKey, Name: "Operators", Role: "admin"}, {Key: readerKey, Name: "Service", Role: "reader"},
		{Key: limited, Name: "Others", Role: "admin", Namespaces: []string{"other"}}})
	for _, p := range d.paths {
		for method, op := range p.operations {
			for status := range op.answers {
				target := filled.Replace(p.path)
				if status == http.StatusBadRequest {
					target += "?unknown"
				}
				r := httptest.NewRequest(method, target, nil)
				r.Header.Set("X-API-Key", adminKey)
				switch status {
				case http.StatusTemporaryRedirect:
					if a, err := do(method, follower.url+target, adminKey, ""); err != nil || a.status != status {
						t.Errorf("%s %s on a follower is answered %v, want %d (%v)", method, target, a, status, err)
					}
					continue
				case http.StatusBadRequest:
				case http.StatusUnauthorized:
					r.Header.Del("X-API-Key")
				case http.StatusForbidden:
					r.Header.Set("X-API-Key", limited)
				case http.StatusTooManyRequests:
					r.Header.Set("X-API-Key", wrongKey)
					s.refusals.most = 0
				case http.StatusRequestEntityTooLarge:
					r.ContentLength = 1 << 40
				case http.StatusUnsupportedMediaType:
					r.Body, r.ContentLength = io.NopCloser(strings.NewReader("{}")), 2
					r.Header.Set("Content-Encoding", "gzip")
				default:
					continue
				}
				if status > http.StatusForbidden && status != http.StatusTooManyRequests && method != "GET" && method != "HEAD" {
					// A node without a leader does not look at the body of a write.
					req := &rawRequest{addr: leader.api, method: method, target: target, header: []string{"X-API-Key: " + adminKey, "Content-Length: 999999999"}}
					if status == http.StatusUnsupportedMediaType {
						req.header[1] = "Content-Encoding: gzip"
						req.body = []byte("{}")
					}
					if got, err := req.send(); err != nil || got.StatusCode != status {
						t.Errorf("%s %s is answered %v, want %d (%v)", method, target, got, status, err)
					}
					continue
				}
				rec := httptest.NewRecorder()
				s.ServeHTTP(rec, r)
				s.refusals.most = 1 << 30
				a := &answer{rec.Code, rec.Header(), rec.Body.Bytes()}
				if method == "HEAD" {
					a.body = nil
				}
				if err := documented(method, target, a); err != nil || a.status != status {
					t.Errorf("%s %s is answered %v, want %d (%v)", method, target, a, status, err)
				}
			}
		}
	}
}

// everyStatus says which statuses below 500 the document has and no answer had.
func (d *document) everyStatus() (missing []string) {
	// What the cluster of the scripts does not do, and why, or what does.
	elsewhere := map[string]string{
		"200 PUT /api/v1/backup":                "TestRestore",
		"409 PUT /api/v1/backup":                "TestRestore",
		"200 PUT /api/v1/cluster/nodes/{id}":    "TestMembers",
		"201 PUT /api/v1/cluster/nodes/{id}":    "TestMembers",
		"204 DELETE /api/v1/cluster/nodes/{id}": "TestMembers",
		"409 DELETE /api/v1/cluster/nodes/{id}": "TestMembers",
		"409 POST /api/v1/cluster/leader":       "TestMembers",
		"410 GET /api/v1/verify":                "needs a trail that was trimmed",
		"410 GET /api/v1/config/{ns}/{key}":     "needs a trail that was trimmed",
	}
	for _, p := range d.paths {
		for method, op := range p.operations {
			for _, status := range slices.Sorted(maps.Keys(op.answers)) {
				name := fmt.Sprintf("%d %s", status, op.name)
				if method != "HEAD" && status < 500 && op.answers[status].seen.Load() == 0 && elsewhere[name] == "" {
					missing = append(missing, name)
				}
			}
		}
	}
	slices.Sort(missing)
	return missing
}

// TestSwagger: the page and what it loads come from the node, compressed or not, and may do nothing but ask it.
func TestSwagger(t *testing.T) {
	t.Parallel()
	s := newReader(t, newWriter(t, t.TempDir()))
	get := func(target, encoding string) *httptest.ResponseRecorder {
		r, rec := httptest.NewRequest("GET", target, nil), httptest.NewRecorder()
		if encoding != "" {
			r.Header.Set("Accept-Encoding", encoding)
		}
		s.ServeHTTP(rec, r)
		if err := documented("GET", target, &answer{rec.Code, rec.Header(), rec.Body.Bytes()}); err != nil {
			t.Error(err)
		}
		return rec
	}
	page := get("/swagger", "").Body.String()
	loads := regexp.MustCompile(`(?:src|href)="([^"]*)"`).FindAllStringSubmatch(page, -1)
	for _, m := range loads {
		plain, packed := get(m[1], ""), get(m[1], "br, gzip")
		if plain.Code != http.StatusOK || packed.Code != http.StatusOK || plain.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: %d, %d %v", m[1], plain.Code, packed.Code, plain.Header())
			continue
		}
		text := packed.Body.Bytes()
		if packed.Header().Get("Content-Encoding") == "gzip" {
			zr, err := gzip.NewReader(packed.Body)
			if err != nil {
				t.Fatal(err)
			}
			if text, err = io.ReadAll(zr); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(text, plain.Body.Bytes()) || len(text) < 100 {
			t.Errorf("%s: %d bytes, compressed %d", m[1], plain.Body.Len(), len(text))
		}
	}
	if len(loads) != 4 {
		t.Errorf("the page loads %q", loads)
	}
	if a := get("/swagger/swagger-ui.js", ""); a.Code != http.StatusNotFound {
		t.Errorf("a file that the page does not use: %d", a.Code)
	}
	if a := get("/openapi.json", ""); !bytes.Equal(a.Body.Bytes(), openapiJSON) {
		t.Errorf("/openapi.json is %d bytes", a.Body.Len())
	}
}
