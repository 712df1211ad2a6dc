package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A hostile request is a paragraph of testdata/hostile.txt: what is sent, byte for byte, and what
// must come of it, to the last answer on the connection.
//
//	paragraph = { "#" comment LF } answer { ", " answer } LF { line }
//	answer    = 3DIGIT [ " raw" | " " slug ]    "raw": net/http refuses it, in its own words
//	line      = ">" [ " " bytes ] LF
//
// Lines are joined by CR LF. Where none of them is empty, the head is all, and two more end it. In a
// line, ${...} means what it means in the scripts of testdata/api, see scriptCase. The variables
// are host, admin and reader; head (Host, the administrator's key and Connection: close); smuggled, a
// whole request that deletes the key, and hidden, its length; length, how many bytes the body has.
// <crlf> is CR LF, also in what is repeated.
type hostile struct {
	line    int
	answers []string
	request []string
}

var hostileAnswers = regexp.MustCompile(`^[1-5]\d\d( [a-z-]+)?(, [1-5]\d\d( [a-z-]+)?)*$`)

// parseHostile is strict: an expectation that is not understood is one that is not checked.
func parseHostile(text string) (all []*hostile, err error) {
	var h *hostile
	for i, line := range strings.Split(text, "\n") {
		switch {
		case line == "":
			h = nil
		case line[0] == '#' && h == nil:
		case h == nil && hostileAnswers.MatchString(line):
			h = &hostile{line: i + 1, answers: strings.Split(line, ", ")}
			all = append(all, h)
		case h != nil && (line == ">" || strings.HasPrefix(line, "> ")):
			h.request = append(h.request, strings.TrimPrefix(line[1:], " "))
		default:
			return nil, fmt.Errorf("line %d: %q", i+1, line)
		}
	}
	return all, nil
}

// bytes is what is sent.
func (h *hostile) bytes(vars map[string]string) ([]byte, error) {
	vars = maps.Clone(vars)
	expand := func(lines []string) (string, error) {
		text, err := (&script{vars: vars}).expand(strings.Join(lines, "\r\n"))
		return strings.ReplaceAll(text, "<crlf>", "\r\n"), err
	}
	lines, end := h.request, slices.Index(h.request, "")
	if end < 0 {
		lines, end = append(slices.Clone(lines), "", ""), len(lines)
	}
	body, err := expand(lines[end+1:])
	if err != nil {
		return nil, err
	}
	vars["length"] = strconv.Itoa(len(body))
	head, err := expand(lines[:end])
	return []byte(head + "\r\n\r\n" + body), err
}

// exchange sends the request on a connection of its own and reads answers until the node closes it.
func (h *hostile) exchange(addr string, request []byte) (got []*rawAnswer, err error) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit(20 * time.Second)))
	written := make(chan struct{})
	go func() {
		conn.Write(request) // a node that has had enough does not take all of it
		close(written)
	}()
	defer func() {
		conn.Close()
		<-written
	}()
	r, asked := bufio.NewReader(conn), bufio.NewReader(bytes.NewReader(request))
	method, _, _ := strings.Cut(string(request[:min(len(request), 10)]), " ")
	for {
		if _, err := r.Peek(1); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return got, fmt.Errorf("the connection is still open after %d answers", len(got))
			}
			return got, nil
		}
		resp, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			return got, fmt.Errorf("no answer: %w", err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return got, fmt.Errorf("half an answer: %w", err)
		}
		got = append(got, &rawAnswer{resp, body})
		// The request as net/http understands it; what it does not understand it refuses itself.
		target := ""
		if req, err := http.ReadRequest(asked); err == nil {
			io.Copy(io.Discard, req.Body) // to the next request
			method, target = req.Method, req.RequestURI
		}
		if err := documented(method, target, &answer{resp.StatusCode, resp.Header, body}); err != nil {
			return got, err
		}
		if resp.Close {
			return got, nil
		}
	}
}

// TestHostile: each request of testdata/hostile.txt gets exactly the answers that it must, none of them
// is a fault of ours, and what is refused has changed nothing. Two statuses above 500 are net/http's
// and say what RFC 9110 and 9112 ask for: 501 and 505.
func TestHostile(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("testdata/hostile.txt")
	if err != nil {
		t.Fatal(err)
	}
	all, err := parseHostile(string(text))
	if err != nil {
		t.Fatalf("testdata/hostile.txt: %v", err)
	}
	if len(all) < 100 {
		t.Fatalf("there are %d requests", len(all))
	}
	c := startCluster(t, 1, calm)
	n := c.nodes[0]
	n.put(t, "hostile", "k", "v")
	vars := map[string]string{"host": n.api, "admin": adminKey, "reader": readerKey}
	vars["head"] = "Host: " + n.api + "\r\nX-API-Key: " + adminKey + "\r\nConnection: close"
	vars["smuggled"] = "DELETE " + keyPath("hostile", "k") + " HTTP/1.1\r\n" + vars["head"] + "\r\n\r\n"
	vars["hidden"] = strconv.Itoa(len(vars["smuggled"]))
	made := 1 // events, that of the put above included
	for _, h := range all {
		at := fmt.Sprintf("testdata/hostile.txt:%d", h.line)
		request, err := h.bytes(vars)
		if err != nil {
			t.Errorf("%s: %v", at, err)
			continue
		}
		got, err := h.exchange(n.api, request)
		if err != nil {
			t.Errorf("%s: %v", at, err)
		}
		var are []string
		for i, a := range got {
			is := strconv.Itoa(a.StatusCode)
			if a.StatusCode == http.StatusCreated {
				made++
			}
			switch media := a.Header.Get("Content-Type"); {
			case media == "application/problem+json":
				is += " " + (&answer{body: a.body}).slug()
			case a.StatusCode >= 400 && strings.HasPrefix(media, "text/plain"):
				is += " raw"
			}
			if a.StatusCode >= 500 && (!strings.HasSuffix(is, " raw") || a.StatusCode != 501 && a.StatusCode != 505) {
				t.Errorf("%s: a fault of ours: %s %s", at, a.Status, a.body)
			}
			for name := range a.Header {
				if strings.Contains(name, "Inject") {
					t.Errorf("%s: answer %d has the header %s", at, i, name)
				}
			}
			are = append(are, is)
		}
		if want := strings.Join(h.answers, ", "); strings.Join(are, ", ") != want {
			body := ""
			if len(got) > 0 {
				body = clipped(string(got[len(got)-1].body))
			}
			t.Errorf("%s: %s\nis answered with %q, want %q\n%s", at, clipped(string(request)), are, want, body)
		}
	}
	if a := n.ask(t, "GET", keyPath("hostile", "k"), ""); !strings.Contains(string(a.body), `"value":"v"`) {
		t.Errorf("the key is now %v", a)
	}
	if events := n.trail(t, ""); len(events) != made {
		t.Errorf("the trail has %d events, want %d", len(events), made)
	}
	// A line of the log that a request wrote would not have the form of ours.
	for line := range strings.Lines(n.logged()) {
		if !strings.HasPrefix(line, "time=20") || strings.Contains(line, "level=ERROR") {
			t.Errorf("the log holds the line %q", line)
		}
	}
	t.Logf("%d requests", len(all))
}
