package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// placeholder is what stands for a kind of text in an expectation.
var placeholder = regexp.MustCompile(`<(rev|int|time|hash|cursor|id|text|any|absent)(?: ([a-z]\w*))?>`)

// decodeJSON decodes one JSON text, numbers as they are written.
func decodeJSON(b []byte) (v any, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	if d.More() {
		return nil, errors.New("data after the JSON text")
	}
	return v, nil
}

// A matcher compares with patterns and keeps what their placeholders catch.
type matcher struct {
	known, caught map[string]string
}

// forms is the regular expression of each kind of placeholder.
var forms = map[string]string{
	"rev": `[1-9][0-9]*`, "int": `0|[1-9][0-9]*`, "hash": `[0-9a-f]{64}`,
	"time":   `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z`,
	"cursor": `[A-Za-z0-9_-]+`, "id": `[A-Za-z0-9._-]{1,128}`, "text": `(?s:.+)`, "any": `(?s:.*)`,
}

// text reports whether is has the form of pattern. What it catches is kept only
// then, and a name that has a value matches nothing else.
func (m *matcher) text(pattern, is string) bool {
	var re strings.Builder
	var names []string
	at := 0
	for _, p := range placeholder.FindAllStringSubmatchIndex(pattern, -1) {
		re.WriteString(regexp.QuoteMeta(pattern[at:p[0]]))
		re.WriteString("(" + forms[pattern[p[2]:p[3]]] + ")")
		name := ""
		if p[4] >= 0 {
			name = pattern[p[4]:p[5]]
		}
		names = append(names, name)
		at = p[1]
	}
	if at == 0 {
		return pattern == is
	}
	re.WriteString(regexp.QuoteMeta(pattern[at:]))
	groups := regexp.MustCompile(`\A(?:` + re.String() + `)\z`).FindStringSubmatch(is)
	if groups == nil {
		return false
	}
	found := map[string]string{}
	for i, name := range names {
		if name == "" {
			continue
		}
		for _, vars := range []map[string]string{m.known, m.caught, found} {
			if v, ok := vars[name]; ok && v != groups[i+1] {
				return false
			}
		}
		found[name] = groups[i+1]
	}
	maps.Copy(m.caught, found)
	return true
}

// resolve returns want with what came in place of each placeholder that it
// matches, so that comparing the two shows only what is really different.
func (m *matcher) resolve(want, is any) any {
	switch w := want.(type) {
	case map[string]any:
		i, _ := is.(map[string]any)
		out := map[string]any{}
		for k, v := range w {
			got, ok := i[k]
			if !ok {
				out[k] = v
				continue
			}
			out[k] = m.resolve(v, got)
		}
		return out
	case []any:
		i, _ := is.([]any)
		out := make([]any, len(w))
		for k, v := range w {
			out[k] = v
			if k < len(i) {
				out[k] = m.resolve(v, i[k])
			}
		}
		return out
	case string:
		whole := placeholder.FindString(w) == w && w != ""
		switch i := is.(type) {
		case string:
			if !(whole && (strings.HasPrefix(w, "<rev") || strings.HasPrefix(w, "<int"))) && m.text(w, i) {
				return is
			}
		case json.Number:
			if whole && (strings.HasPrefix(w, "<rev") || strings.HasPrefix(w, "<int")) && m.text(w, i.String()) {
				return is
			}
		}
		if w == "<any>" {
			return is
		}
	}
	return want
}

// TestMatcher shows that a pattern refuses what it does not describe: a runner that
// takes everything would hide every defect.
func TestMatcher(t *testing.T) {
	for _, tt := range []struct {
		want, is string
		ok       bool
	}{
		{`{"a":"<rev r>","b":"<rev r>"}`, `{"a":7,"b":7}`, true},
		{`{"a":"<rev r>","b":"<rev r>"}`, `{"a":7,"b":8}`, false},
		{`{"a":"<rev old>"}`, `{"a":4}`, false},
		{`{"a":"<rev>"}`, `{"a":0}`, false},
		{`{"a":"<rev>"}`, `{"a":"7"}`, false},
		{`{"a":"<int>"}`, `{"a":0}`, true},
		{`{"a":"<text>"}`, `{"a":""}`, false},
		{`{"a":"<text>"}`, `{"a":null}`, false},
		{`{"a":"<any>"}`, `{"a":null}`, true},
		{`{"a":"<any>"}`, `{}`, false},
		{`{"a":"<rev old>-0"}`, `{"a":"3-0"}`, true},
		{`{"a":"<rev old>-0"}`, `{"a":"33-0"}`, false},
		{`{"a":"<time>"}`, `{"a":"2026-01-02T03:04:05.000000001Z"}`, true},
		{`{"a":"<time>"}`, `{"a":"2026-01-02T03:04:05+01:00"}`, false},
		{`[1]`, `[1,2]`, false},
		{`{"a":1}`, `{"a":1,"b":2}`, false},
		{`{"a":1.0}`, `{"a":1}`, false},
	} {
		want, werr := decodeJSON([]byte(tt.want))
		is, err := decodeJSON([]byte(tt.is))
		if werr != nil || err != nil {
			t.Fatal(werr, err)
		}
		m := &matcher{known: map[string]string{"old": "3"}, caught: map[string]string{}}
		if ok := cmp.Equal(m.resolve(want, is), is); ok != tt.ok {
			t.Errorf("%s against %s: %v, want %v", tt.is, tt.want, ok, tt.ok)
		}
	}
}
