package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// TestAppendString: strings are written in one form. A stranger who recomputes the
// hashes of the trail relies on it.
func TestAppendString(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"":                       `""`,
		"plain":                  `"plain"`,
		`"\`:                     `"\"\\"`,
		"/<>&'":                  `"/<>&'"`,
		"\x00\x01\x0b\x0e\x1f":   `"\u0000\u0001\u000b\u000e\u001f"`,
		"\b\t\n\f\r":             `"\b\t\n\f\r"`,
		"\x7f\u0080\u2028\u2029": "\"\x7f\u0080\u2028\u2029\"",
		"\u00fc\u20ac\U0001f600": "\"\u00fc\u20ac\U0001f600\"",
		"\ufeff\ufffd\uffff":     "\"\ufeff\ufffd\uffff\"",
		"a\nb\nc":                `"a\nb\nc"`,
		"\n":                     `"\n"`,
	} {
		if got := string(appendString([]byte("x"), in)); got != "x"+want {
			t.Errorf("%q is written %s, want %s", in, got[1:], want)
		}
	}
	// Every character alone, against encoding/json, which differs in two of them.
	var enc bytes.Buffer
	e := json.NewEncoder(&enc)
	e.SetEscapeHTML(false)
	for r := rune(0); r <= utf8.MaxRune; r++ {
		if !utf8.ValidRune(r) || r == '\u2028' || r == '\u2029' {
			continue
		}
		enc.Reset()
		if err := e.Encode(string(r)); err != nil {
			t.Fatal(err)
		}
		if got := appendString(nil, string(r)); string(got) != strings.TrimSuffix(enc.String(), "\n") {
			t.Errorf("%U is written %s, encoding/json writes %s", r, got, enc.String())
		}
	}
}

// TestCheckJSON: what a body may be, and that the error names the place.
func TestCheckJSON(t *testing.T) {
	t.Parallel()
	nested := func(levels int) string { return strings.Repeat("[", levels) + strings.Repeat("]", levels) }
	for _, tt := range []struct {
		in   string
		want []string // in the error; nil for none
	}{
		{`{}`, nil},
		{" \t\r\n{ } \n", nil},
		{`null`, nil},
		{`-0.5e+10`, nil},
		{`"\ud83d\ude00 \u00e9 / \/"`, nil},
		{`{"a":1,"A":2,"b":{"a":3}}`, nil},
		{`[{"a":1},{"a":1}]`, nil},
		{nested(100), nil},
		{strings.Repeat(`{"a":`, 100) + "1" + strings.Repeat("}", 100), nil},

		{``, []string{"empty"}},
		{" \n", []string{"empty"}},
		{nested(101), []string{"at byte 101", "100 levels"}},
		{strings.Repeat(`{"a":`, 101) + "1" + strings.Repeat("}", 101), []string{"100 levels"}},
		{strings.Repeat("[", 1<<20), []string{"100 levels"}},
		{`{"a":1,"b":{"c":1,"c":2}}`, []string{"/b/c", `"c"`, "twice"}},
		{`{"a":1,"\u0061":2}`, []string{`"a"`, "twice"}},
		{`{} {}`, []string{"at byte 2", "after"}},
		{strings.Repeat("[1],", 3), []string{"at byte 3", "after"}},
		{`{}x`, []string{"at byte 2", "after"}},
		{`"a" "`, []string{"at byte 3", "after"}},
		{`{"a":"\ud83d"}`, []string{"at byte", "/a"}},
		{`{"a":"\ude00\ud83d"}`, []string{"at byte", "/a"}},
		{`{"\ud83d":1}`, []string{"at byte"}},
		{"[\"\xff\"]", []string{"at byte", "UTF-8"}},
		{"[\"\xed\xa0\x80\"]", []string{"at byte", "UTF-8"}},
		{"\ufeff{}", []string{"at byte 0"}},
		{`{"a":1`, []string{"at byte 6", "ends early"}},
		{`["a`, []string{"ends early"}},
		{`tru`, []string{"ends early"}},
		{`{"a":1,}`, []string{"at byte 6"}},
		{`[1,]`, []string{"at byte 2"}},
		{`{'a':1}`, []string{"at byte 1"}},
		{`{a:1}`, []string{"at byte 1"}},
		{`[01]`, []string{"at byte 2"}},
		{`[+1]`, []string{"at byte 1"}},
		{`[.5]`, []string{"at byte 1"}},
		{`[1.]`, []string{"at byte"}},
		{`[NaN]`, []string{"at byte 1"}},
		{`[True]`, []string{"at byte 1"}},
		{"[\"a\nb\"]", []string{"at byte"}},
		{`["\x41"]`, []string{"at byte"}},
		{"[1]//", []string{"at byte 3", "after"}},
		{"\x00", []string{"at byte 0"}},
	} {
		err := checkJSON([]byte(tt.in))
		if (err == nil) != (tt.want == nil) {
			t.Errorf("%.80q: %v", tt.in, err)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%.80q: the error is %q, without %q", tt.in, err, want)
			}
		}
		if err != nil && (!utf8.ValidString(err.Error()) || strings.ContainsFunc(err.Error(), isControl) || len(err.Error()) > 400) {
			t.Errorf("%.80q: the error does not suit a problem document: %q", tt.in, err)
		}
	}
}

// TestObjectMembers: members come in the order of the text, their values as they stood.
func TestObjectMembers(t *testing.T) {
	t.Parallel()
	ms, err := objectMembers([]byte(" { \"z\" : 1.50 , \"\\u0061\\n\":{ \"x\" : [ ] },\"\":null , \"s\":\"\\u0041\" } "))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range ms {
		got = append(got, m.name, string(m.raw))
	}
	if diff := cmp.Diff([]string{"z", "1.50", "a\n", `{ "x" : [ ] }`, "", "null", "s", `"\u0041"`}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, in := range []string{`[]`, `"{}"`, `1`, `null`} {
		if ms, err := objectMembers([]byte(in)); err == nil {
			t.Errorf("%s has the members %v", in, ms)
		}
	}
}

// TestValueTypes: the four types that are checked, at their borders.
func TestValueTypes(t *testing.T) {
	t.Parallel()
	for typ, values := range map[string]struct{ good, bad string }{
		"number": {"0 -0 1 -1.5 1e3 1E-3 1.50 123456789012345678901234567890", " 01 +1 .5 1. 1e NaN 0x1 1_0 -  1,5 \"1\""},
		"bool":   {"true false", " True TRUE 1 0 yes null"},
		"json":   {`{} [] null 1 "s" {"a":[1]}`, ` {} {a:1} tru`},
		"string": {"anything true 1", ""},
		"x.y+z-": {"anything", ""},
	} {
		for v := range strings.SplitSeq(values.good, " ") {
			if err := checkValue(v, typ); err != nil {
				t.Errorf("%s %q: %v", typ, v, err)
			}
		}
		bad := strings.Split(values.bad, " ")
		if typ == "json" { // the spaces are part of them
			bad = []string{"", " ", "{} {}", "{a:1}", "tru"}
		}
		for _, v := range bad {
			if err := checkValue(v, typ); (err == nil) != (values.bad == "") {
				t.Errorf("%s %q: %v", typ, v, err)
			}
		}
	}
}

// TestParseTags: lists of entity tags as RFC 9110 writes them.
func TestParseTags(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		in   string
		any  bool
		revs []uint64
		weak []uint64 // those of revs that only a weak comparison finds
		bad  bool
	}{
		{in: `*`, any: true},
		{in: " *\t", any: true},
		{in: `"42"`, revs: []uint64{42}},
		{in: `"1","2" , "3"`, revs: []uint64{1, 2, 3}},
		{in: `, ,"1",,"2",`, revs: []uint64{1, 2}},
		{in: `"1", W/"2"`, revs: []uint64{1, 2}, weak: []uint64{2}},
		{in: `W/"7"`, revs: []uint64{7}, weak: []uint64{7}},
		{in: `"0"`, revs: []uint64{0}},
		{in: `"18446744073709551615"`, revs: []uint64{1<<64 - 1}},
		// Tags of other programs are well formed and match nothing.
		{in: `"18446744073709551616"`}, {in: `"042"`}, {in: `"+1"`}, {in: `"-1"`}, {in: `"abc"`}, {in: `""`},
		{in: `"*"`}, {in: `"a,b"`}, {in: `"a\"`}, {in: "\"\u00fc\""}, {in: `"x", "5"`, revs: []uint64{5}},

		{in: ``, bad: true}, {in: ` , ,`, bad: true}, {in: `42`, bad: true}, {in: `"42`, bad: true}, {in: `42"`, bad: true},
		{in: `"1" "2"`, bad: true}, {in: `"1";"2"`, bad: true}, {in: `w/"1"`, bad: true}, {in: `W/1`, bad: true},
		{in: `W/ "1"`, bad: true}, {in: `*,"1"`, bad: true}, {in: `"1",*`, bad: true}, {in: `**`, bad: true},
		{in: `"a b"`, bad: true}, {in: "\"a\x7f\"", bad: true}, {in: `'1'`, bad: true},
	} {
		for _, weakToo := range []bool{false, true} {
			want := slices.DeleteFunc(slices.Clone(tt.revs), func(r uint64) bool { return !weakToo && slices.Contains(tt.weak, r) })
			any, revs, err := parseTags(tt.in, weakToo)
			if any != tt.any || !slices.Equal(revs, want) || (err != nil) != tt.bad {
				t.Errorf("%q, weak too %t: %t, %d, %v", tt.in, weakToo, any, revs, err)
			}
		}
	}
}

// TestCondition: what is decided, and that a condition comes out of the log as it went in.
func TestCondition(t *testing.T) {
	t.Parallel()
	there := &current{Revision: 5}
	for _, tt := range []struct {
		c              condition
		missing, found bool // holds where nothing is, and where revision 5 is
	}{
		{condition{}, true, true},
		{condition{hasMatch: true, matchAny: true}, false, true},
		{condition{hasMatch: true, match: []uint64{5}}, false, true},
		{condition{hasMatch: true, match: []uint64{4, 5}}, false, true},
		{condition{hasMatch: true, match: []uint64{4}}, false, false},
		{condition{hasMatch: true}, false, false}, // only tags of other programs
		{condition{hasNone: true, noneAny: true}, true, false},
		{condition{hasNone: true, none: []uint64{5}}, true, false},
		{condition{hasNone: true, none: []uint64{4, 6}}, true, true},
		{condition{hasNone: true}, true, true},
		{condition{hasMatch: true, match: []uint64{5}, hasNone: true, none: []uint64{4}}, false, true},
		{condition{hasMatch: true, matchAny: true, hasNone: true, noneAny: true}, false, false},
		{condition{hasMatch: true, match: []uint64{1<<64 - 1}}, false, false},
	} {
		data, err := encode(&command{Op: "set", If: tt.c})
		if err != nil {
			t.Fatal(err)
		}
		read, err := decodeOne(data)
		if err != nil {
			t.Fatalf("%s: %v", data[4:], err)
		}
		if diff := cmp.Diff(fmt.Sprintf("%+v", tt.c), fmt.Sprintf("%+v", read.If)); diff != "" {
			t.Errorf("through the log (-in +out):\n%s", diff)
		}
		for _, c := range []condition{tt.c, read.If} {
			if err := c.check(nil); (err == nil) != tt.missing {
				t.Errorf("%+v, nothing there: %v", c, err)
			}
			if err := c.check(there); (err == nil) != tt.found {
				t.Errorf("%+v, revision 5 there: %v", c, err)
			}
		}
	}
}
