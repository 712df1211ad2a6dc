package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// TestClientIP: X-Forwarded-For counts from trusted proxies only, as far as they have seen it.
func TestClientIP(t *testing.T) {
	t.Parallel()
	for _, m := range []struct {
		trusted, remote, said, want string
	}{
		{"", "192.0.2.9:1", "198.51.100.1", "192.0.2.9"},
		{"10.0.0.0/8", "192.0.2.9:1", "198.51.100.1", "192.0.2.9"},
		{"10.0.0.0/8", "10.1.2.3:1", "198.51.100.1", "198.51.100.1"},
		{"10.0.0.0/8", "10.1.2.3:1", "", "10.1.2.3"},
		{"10.1.2.3", "10.1.2.3:1", "198.51.100.1", "198.51.100.1"},
		{"10.1.2.3", "10.1.2.4:1", "198.51.100.1", "10.1.2.4"},
		{"10.1.2.3/8", "10.9.9.9:1", "198.51.100.1", "198.51.100.1"},
		// The client writes what it likes; the proxy appends whom it saw.
		{"10.0.0.0/8", "10.1.2.3:1", "127.0.0.1, 203.0.113.7", "203.0.113.7"},
		{"10.0.0.0/8", "10.1.2.3:1", "10.9.9.9,203.0.113.7", "203.0.113.7"},
		{"10.0.0.0/8", "10.1.2.3:1", "127.0.0.1 , 203.0.113.7 ,10.0.0.1,\t10.0.0.2", "203.0.113.7"},
		{"10.0.0.0/8", "10.1.2.3:1", "127.0.0.1|203.0.113.7", "203.0.113.7"}, // two headers
		{"10.0.0.0/8", "10.1.2.3:1", "10.0.0.1, 10.0.0.2", "10.0.0.1"},
		// What is no address is not believed, nor what stands before it.
		{"10.0.0.0/8", "10.1.2.3:1", "203.0.113.7, unknown", "10.1.2.3"},
		{"10.0.0.0/8", "10.1.2.3:1", "203.0.113.7, unknown, 10.0.0.2", "10.0.0.2"},
		{"10.0.0.0/8", "10.1.2.3:1", "203.0.113.7,", "10.1.2.3"},
		{"10.0.0.0/8", "10.1.2.3:1", "203.0.113.7:80", "10.1.2.3"},
		{"10.0.0.0/8", "10.1.2.3:1", "203.0.113.007", "10.1.2.3"},
		{"10.0.0.0/8", "10.1.2.3:1", "fe80::1%eth0", "10.1.2.3"},
		{"10.0.0.0/8", "10.1.2.3:1", `203.0.113.7" source="1.2.3.4`, "10.1.2.3"},
		{"10.0.0.0/8", "10.1.2.3:1", strings.Repeat("10.0.0.1,", 9000) + "203.0.113.7", "203.0.113.7"},
		// IPv6, and IPv4 in it.
		{"fd00::/8", "[fd00::1]:1", "2001:db8::7, fd00::2", "2001:db8::7"},
		{"10.0.0.0/8", "[::ffff:10.1.2.3]:1", "203.0.113.7", "203.0.113.7"},
		{"10.0.0.0/8", "10.1.2.3:1", "203.0.113.7, ::ffff:10.0.0.2", "203.0.113.7"},
		{"10.0.0.0/8", "no address", "203.0.113.7", "no address"},
	} {
		c := &config{}
		if m.trusted != "" {
			c.TrustedProxies = []string{m.trusted}
		}
		if err := c.readProxies(); err != nil {
			t.Fatal(err)
		}
		r := &http.Request{RemoteAddr: m.remote, Header: http.Header{}}
		if m.said != "" {
			r.Header["X-Forwarded-For"] = strings.Split(m.said, "|")
		}
		if got := c.clientIP(r); got != m.want {
			t.Errorf("%q trusted, from %s, X-Forwarded-For %.60q: %s, want %s", m.trusted, m.remote, m.said, got, m.want)
		}
	}
	for _, bad := range []string{"", "10.0.0.0/33", "proxy.example", "0.0.0.0/0", "::/0", "::ffff:10.0.0.0/104", "10.0.0.1:80", "fe80::1%eth0"} {
		c := &config{TrustedProxies: []string{"10.0.0.1", bad}}
		if err := c.readProxies(); err == nil || !strings.HasPrefix(err.Error(), "TrustedProxies[1]: ") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// TestProxiedSource: the trail shows the address that the proxy saw, on the leader and through a follower
// that forwards, and never one that a client made up.
func TestProxiedSource(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, with("Cluster", "Forward", true), func(doc map[string]any) { doc["TrustedProxies"] = []string{"127.0.0.2/32"} })
	for _, n := range []*node{c.leader(), c.followers()[0]} {
		for _, m := range []struct{ from, want string }{{"127.0.0.2", "203.0.113.7"}, {"127.0.0.1", "127.0.0.1"}} {
			body := `{"value":"` + n.id + m.from + `"}`
			r := &rawRequest{addr: n.api, from: m.from, method: "PUT", target: keyPath("app", "k"), body: []byte(body), header: []string{
				"X-API-Key: " + adminKey, "X-Forwarded-For: 198.51.100.1", "X-Forwarded-For: 203.0.113.7", "Confman-Source: 198.51.100.2"}}
			a, err := r.send()
			if err != nil || a.StatusCode/100 != 2 {
				t.Fatalf("from %s at %s: %v, %v", m.from, n.id, a, err)
			}
			trail := n.ask(t, "GET", "/api/v1/audit/app?consistent&limit=1", "")
			var page struct{ Items []struct{ Source string } }
			if err := json.Unmarshal(trail.body, &page); err != nil || len(page.Items) != 1 || page.Items[0].Source != m.want {
				t.Errorf("from %s at %s: the trail says %v, want source %s", m.from, n.id, trail, m.want)
			}
		}
	}
}

// TestForwardedMadeUp: what a client writes into X-Forwarded-For is not believed because a node, which
// stands among the trusted proxies, has passed it on.
func TestForwardedMadeUp(t *testing.T) {
	t.Parallel()
	for name, how := range map[string]edit{"plaintext": plaintext, "tls": func(map[string]any) {}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := startCluster(t, 3, calm, how, with("Cluster", "Forward", true), func(doc map[string]any) { doc["TrustedProxies"] = []string{"127.0.0.1"} })
			leader, f := c.leader(), c.followers()[0]
			r := &rawRequest{addr: f.api, method: "PUT", target: keyPath("app", "k"), // from 127.0.0.2, which is no proxy
				header: []string{"X-API-Key: " + adminKey, "X-Forwarded-For: 192.0.2.66"}, body: []byte(`{"value":"v"}`)}
			if a, err := r.send(); err != nil || a.StatusCode != http.StatusCreated {
				t.Fatal(a, err)
			}
			if e := leader.trail(t, "app"); e[0].Source == "192.0.2.66" {
				t.Errorf("the source in the trail is %s, which the client made up", e[0].Source)
			}
		})
	}
}

// TestForwardedHead: what the leader takes, it takes from a follower that passes it on.
func TestForwardedHead(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, calm, with("Cluster", "Forward", true))
	h := []string{"X-API-Key: " + adminKey}
	for range 16000 { // net/http writes each of them with a space more
		h = append(h, "a:")
	}
	for _, n := range []*node{c.leader(), c.followers()[0]} {
		r := &rawRequest{addr: n.api, method: "PUT", target: keyPath("app", n.id), header: h, body: []byte(`{"value":"v"}`)}
		if a, err := r.send(); err != nil || a.StatusCode != http.StatusCreated {
			t.Errorf("at %s: %v, %v", n.id, a, err)
		}
	}
}

// TestForwardBurst: writes that a follower passes on all at once all arrive, and push nobody's
// connections out of the leader's Raft port.
func TestForwardBurst(t *testing.T) {
	t.Parallel()
	const clients = 600
	c := startCluster(t, 3, calm, with("Cluster", "Forward", true))
	f := c.followers()[0]
	f.put(t, "app", "k", "v")
	start := make(chan struct{})
	var all sync.WaitGroup
	var mu sync.Mutex // protects refused
	refused := map[string]int{}
	for i := range clients {
		p := newPending(t, f)
		all.Go(func() {
			defer p.conn.Close()
			<-start
			a, err := (*answer)(nil), p.send("PUT", keyPath("app", "k"), fmt.Sprintf(`{"value":"%d"}`, i))
			if err == nil {
				a, err = p.answer()
			}
			if err != nil || a.status != http.StatusOK {
				mu.Lock()
				refused[fmt.Sprint(a, err)[:40]]++
				mu.Unlock()
			}
		})
	}
	close(start)
	all.Wait()
	if len(refused) > 0 {
		t.Errorf("of %d writes at once: %v", clients, refused)
	}
}
