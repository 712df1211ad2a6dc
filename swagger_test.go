package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// A browser is one tab of a headless Chromium, spoken to over its debugging pipe: JSON messages, each with
// a zero byte behind it.
type browser struct {
	tb      testing.TB
	to      io.Writer
	session string

	mu       sync.Mutex // guards the rest
	id       int
	answers  map[int]chan message
	requests []string // URLs, in order
	statuses map[string]int
	errors   []string // of the console, of scripts and of loading
}

// A message is a command's answer or an event of Chromium.
type message struct {
	ID     int             `json:"id"`
	Method string          `json:"method"`
	Params json.RawMessage `json:"params"`
	Result json.RawMessage `json:"result"`
	Error  json.RawMessage `json:"error"`
}

// newBrowser starts Chromium with an empty profile; it ends with the test.
func newBrowser(tb testing.TB) *browser {
	tb.Helper()
	exe, err := exec.LookPath("chromium")
	if err != nil {
		tb.Skip("needs chromium in PATH (Debian: apt-get install chromium)")
	}
	home := tb.TempDir()
	cmd := exec.Command(exe, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "--user-data-dir="+home, "about:blank")
	cmd.Env = append(os.Environ(), "HOME="+home)
	in, to, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	from, out, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{in, out} // its descriptors 3 and 4
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	in.Close()
	out.Close()
	b := &browser{tb: tb, to: to, answers: map[int]chan message{}, statuses: map[string]int{}}
	read := make(chan struct{})
	go func() {
		defer close(read)
		b.read(from)
	}()
	tb.Cleanup(func() {
		b.send("", "Browser.close", nil) // all of its processes; an error says that it has ended
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			cmd.Process.Kill()
			<-done
		}
		to.Close()
		from.Close()
		<-read
	})
	var target struct{ TargetID string }
	b.do(&target, "Target.createTarget", map[string]any{"url": "about:blank"})
	var attached struct{ SessionID string }
	b.do(&attached, "Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true})
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.do(nil, domain+".enable", nil)
	}
	return b
}

// read takes what Chromium says until it ends.
func (b *browser) read(from io.Reader) {
	r := bufio.NewReader(from)
	for {
		text, err := r.ReadBytes(0)
		if err != nil {
			return
		}
		var m message
		if err := json.Unmarshal(text[:len(text)-1], &m); err != nil {
			b.note("%v in %.200q", err, text)
			continue
		}
		var p struct {
			Type, ErrorText, RequestID string
			Request                    struct{ URL string }
			Response                   struct {
				URL    string
				Status int
			}
			Args             []struct{ Value, Description any }
			Entry            struct{ Level, Text, URL string }
			ExceptionDetails struct {
				Text      string
				Exception struct{ Description string }
			}
		}
		if m.Params != nil {
			json.Unmarshal(m.Params, &p) // of other events other members
		}
		switch m.Method {
		case "":
			b.mu.Lock()
			if ch := b.answers[m.ID]; ch != nil {
				ch <- m
			}
			b.mu.Unlock()
		case "Network.requestWillBeSent":
			b.mu.Lock()
			b.requests = append(b.requests, p.Request.URL)
			b.mu.Unlock()
		case "Network.responseReceived":
			b.mu.Lock()
			b.statuses[p.Response.URL] = p.Response.Status
			b.mu.Unlock()
		case "Network.loadingFailed":
			b.note("loading: %s", p.ErrorText)
		case "Runtime.consoleAPICalled":
			if p.Type == "error" || p.Type == "assert" {
				b.note("console: %v", p.Args)
			}
		case "Runtime.exceptionThrown":
			b.note("script: %s %s", p.ExceptionDetails.Text, p.ExceptionDetails.Exception.Description)
		case "Log.entryAdded":
			if p.Entry.Level == "error" {
				b.note("log: %s %s", p.Entry.Text, p.Entry.URL)
			}
		}
	}
}

func (b *browser) note(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.errors = append(b.errors, fmt.Sprintf(format, args...))
}

// send sends a command and returns where its answer will be.
func (b *browser) send(session, method string, params any) (<-chan message, error) {
	b.mu.Lock()
	b.id++
	id, ch := b.id, make(chan message, 1)
	b.answers[id] = ch
	b.mu.Unlock()
	m := map[string]any{"id": id, "method": method}
	if session != "" {
		m["sessionId"] = session
	}
	if params != nil {
		m["params"] = params
	}
	text, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	_, err = b.to.Write(append(text, 0))
	return ch, err
}

// do gives a command and waits for its result.
func (b *browser) do(result any, method string, params any) {
	b.tb.Helper()
	ch, err := b.send(b.session, method, params)
	if err != nil {
		b.tb.Fatal(err)
	}
	select {
	case m := <-ch:
		if m.Error != nil {
			b.tb.Fatalf("%s: %s", method, m.Error)
		}
		if result != nil {
			if err := json.Unmarshal(m.Result, result); err != nil {
				b.tb.Fatal(err)
			}
		}
	case <-time.After(30 * time.Second):
		b.tb.Fatalf("%s: no answer", method)
	}
}

// eval runs a script on the page and returns what it gives, as text.
func (b *browser) eval(script string) string {
	b.tb.Helper()
	var r struct {
		Result           struct{ Value any }
		ExceptionDetails json.RawMessage
	}
	b.do(&r, "Runtime.evaluate", map[string]any{"expression": script, "returnByValue": true})
	if r.ExceptionDetails != nil {
		b.tb.Fatalf("%s: %s", script, r.ExceptionDetails)
	}
	return fmt.Sprint(r.Result.Value)
}

// press waits for the element of a selector and clicks on it.
func (b *browser) press(selector string) {
	b.tb.Helper()
	until(b.tb, 20*time.Second, func() error {
		if b.eval(fmt.Sprintf(`(e => e ? (e.click(), "done") : "")(document.querySelector(%q))`, selector)) != "done" {
			return fmt.Errorf("the page has no %s", selector)
		}
		return nil
	})
}

// enter types text into the field of a selector.
func (b *browser) enter(selector, text string) {
	b.tb.Helper()
	until(b.tb, 20*time.Second, func() error {
		if b.eval(fmt.Sprintf(`(e => e ? (e.focus(), e.select(), document.activeElement === e ? "done" : "") : "")(document.querySelector(%q))`, selector)) != "done" {
			return fmt.Errorf("the page has no %s", selector)
		}
		return nil
	})
	b.do(nil, "Input.insertText", map[string]any{"text": text})
	// The page takes some fields over when they are left.
	if is := b.eval(fmt.Sprintf(`(e => (e.blur(), e.value))(document.querySelector(%q))`, selector)); is != text {
		b.tb.Fatalf("%s holds %q, %q was typed", selector, is, text)
	}
}

// TestSwaggerPage: a person opens the page, enters a key and tries requests: one that reads an entry with a
// / in its key, and one that writes. Nothing is asked of anybody but the node, and nothing goes wrong.
func TestSwaggerPage(t *testing.T) {
	long(t)
	c := startCluster(t, 1)
	n := c.leader()
	n.put(t, "app", "a/b c", "v")
	b := newBrowser(t)
	b.do(nil, "Page.navigate", map[string]any{"url": n.url + "/swagger"})

	b.press(".btn.authorize")
	b.enter(".auth-container input[type=text]", adminKey) // the first is ApiKey
	b.press(".auth-container .btn.authorize")
	b.press(".btn.btn-done")

	try := func(id string, fields map[string]string) (status, body string) {
		t.Helper()
		op := "#operations-Entries-" + id + " "
		b.press(op + ".opblock-summary-control")
		b.press(op + ".try-out__btn")
		for name, text := range fields {
			b.enter(op+name, text)
		}
		b.press(op + ".execute")
		until(t, 20*time.Second, func() error {
			if status = b.eval(fmt.Sprintf(`document.querySelector(%q)?.innerText ?? ""`, op+".live-responses-table tbody .response-col_status")); status == "" {
				b.mu.Lock()
				defer b.mu.Unlock()
				return fmt.Errorf("%s has no answer; asked for %q; %q", id, b.requests, b.errors)
			}
			return nil
		})
		return strings.TrimSpace(status), b.eval(fmt.Sprintf(`document.querySelector(%q)?.innerText ?? ""`, op+".live-responses-table .highlight-code"))
	}
	path := map[string]string{"tr[data-param-name=ns] input": "app", "tr[data-param-name=key] input": "a/b c"}
	if status, body := try("getEntry", path); status != "200" || !strings.Contains(body, `"a/b c"`) {
		t.Errorf("GET from the page: %s %s", status, body)
	}
	path[".body-param__text"] = `{"value":"w"}`
	if status, body := try("putEntry", path); status != "200" || !strings.Contains(body, `"w"`) {
		t.Errorf("PUT from the page: %s %s", status, body)
	}
	if e := n.get(t, "app", "a/b c"); e.Value != "w" || e.UpdatedBy != "ops@test" {
		t.Errorf("the page wrote %+v", e)
	}

	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.errors {
		t.Error(e)
	}
	for _, u := range b.requests {
		if !strings.HasPrefix(u, n.url+"/") && !strings.HasPrefix(u, "data:") {
			t.Errorf("the page asks for %s", u)
		}
	}
	for _, path := range []string{"/swagger", "/openapi.json", "/swagger/page.js", "/api/v1/config/app/a%2Fb%20c"} {
		if status := b.statuses[n.url+path]; status != 200 {
			t.Errorf("the page asked for %s: %d", path, status)
		}
	}
}
