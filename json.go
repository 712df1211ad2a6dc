package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// maxDepth is how deeply objects and arrays of a body may nest.
const maxDepth = 100

// checkJSON says whether b is exactly one JSON text by the rules for bodies: RFC 8259
// in UTF-8 without unpaired surrogate escapes, no member twice in one object, nothing
// behind it and at most maxDepth levels. The error names the place.
func checkJSON(b []byte) error {
	if len(bytes.TrimLeft(b, " \t\r\n")) == 0 {
		return errors.New("the body is empty; JSON is expected")
	}
	d := jsontext.NewDecoder(bytes.NewBuffer(b))
	for {
		_, err := d.ReadToken()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return placeOf(err, b)
		}
		if d.StackDepth() > maxDepth {
			return fmt.Errorf("at byte %d: more than %d levels of nesting", d.InputOffset(), maxDepth)
		}
		if d.StackDepth() == 0 {
			end := d.InputOffset()
			if rest := bytes.TrimLeft(b[end:], " \t\r\n"); len(rest) > 0 {
				return fmt.Errorf("at byte %d: data after the JSON text", end)
			}
			return nil
		}
	}
}

// placeOf turns the decoder's error into one that a client can act on.
func placeOf(err error, b []byte) error {
	if err == io.ErrUnexpectedEOF {
		return fmt.Errorf("at byte %d: the JSON text ends early", len(b))
	}
	var s *jsontext.SyntacticError
	if !errors.As(err, &s) {
		return err
	}
	at := fmt.Sprintf("at byte %d", s.ByteOffset)
	if p := string(s.JSONPointer); p != "" {
		at += fmt.Sprintf(", in %s", strconv.Quote(clip(p, 100)))
	}
	switch {
	case errors.Is(s.Err, jsontext.ErrDuplicateName):
		return fmt.Errorf("%s: the member %s appears twice", at, strconv.Quote(clip(s.JSONPointer.LastToken(), 100)))
	case errors.Is(s.Err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%s: the JSON text ends early", at)
	case s.Err != nil:
		return fmt.Errorf("%s: %s", at, strings.TrimPrefix(s.Err.Error(), "jsontext: "))
	}
	return fmt.Errorf("%s: not JSON", at)
}

// clip shortens s to at most n bytes for a message, at a rune's border.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}

// A member is one name and value of an object; raw is the value's bytes as they
// stood.
type member struct {
	name string
	raw  []byte
}

// objectMembers returns the members of b in the order in which they stand. b has passed
// checkJSON; the error says that it is not an object.
func objectMembers(b []byte) ([]member, error) {
	d := jsontext.NewDecoder(bytes.NewBuffer(b))
	if d.PeekKind() != '{' {
		return nil, errors.New("a JSON object is expected")
	}
	if _, err := d.ReadToken(); err != nil {
		return nil, placeOf(err, b)
	}
	var ms []member
	for d.PeekKind() != '}' {
		name, err := d.ReadToken()
		if err != nil {
			return nil, placeOf(err, b)
		}
		m := member{name: name.String()}
		v, err := d.ReadValue()
		if err != nil {
			return nil, placeOf(err, b)
		}
		m.raw = bytes.Clone(v)
		ms = append(ms, m)
	}
	return ms, nil
}

// stringOf decodes a JSON string that has passed checkJSON.
func stringOf(raw []byte) (string, error) {
	v, err := jsontext.AppendUnquote(nil, raw)
	return string(v), err
}

// validNumber reports whether s is a number of RFC 8259, section 6, and nothing else.
func validNumber(s string) bool {
	return s != "" && (s[0] == '-' || '0' <= s[0] && s[0] <= '9') &&
		'0' <= s[len(s)-1] && s[len(s)-1] <= '9' && json.Valid([]byte(s))
}

// appendString appends s as a JSON string in the one form that stored events and
// entries use, that of RFC 8785, section 3.2.2.2 (and of JSON.stringify): only the
// quote, the backslash and what is below U+0020 are escaped. s is valid UTF-8.
func appendString(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= 0x20 && c != '"' && c != '\\' {
			continue
		}
		b = append(b, s[start:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\b':
			b = append(b, `\b`...)
		case '\t':
			b = append(b, `\t`...)
		case '\n':
			b = append(b, `\n`...)
		case '\f':
			b = append(b, `\f`...)
		case '\r':
			b = append(b, `\r`...)
		default:
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
		start = i + 1
	}
	return append(append(b, s[start:]...), '"')
}
