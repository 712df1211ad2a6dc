package main

import (
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// refusals are the requests that nobody with a right key made, and those that a key does not allow.
// They are counted, and whoever makes many of them fills neither the log nor memory. Everything but
// the counters is about one minute, which begins with its first refusal.
type refusals struct {
	log  *slog.Logger
	most int // wrong and missing keys of one address in a minute; more are answered with 429

	unauthorized, forbidden, tooMany atomic.Uint64 // since the start

	mu     sync.Mutex // guards the rest
	ends   time.Time  // of the minute
	of     map[netip.Prefix]*refused
	lines  int // that were logged
	silent int // that were not
}

// A refused is the refusals of one address.
type refused struct{ failures, lines int }

const (
	// maxAddresses bounds what is kept of a minute; all further addresses are counted as one, of which
	// none that has a right key notices anything.
	maxAddresses = 1 << 16
	// addressLines and allLines are how many lines a minute the refusals of one address, and of all, may
	// add to the log: under 300 MB a day.
	addressLines = 60
	allLines     = 600
)

// from returns the record of an address. Who has an IPv6 address has the /64 that it is in. mu is
// held.
func (r *refusals) from(addr string) *refused {
	if r.of == nil {
		r.of, r.ends = map[netip.Prefix]*refused{}, time.Now().Add(time.Minute)
		time.AfterFunc(time.Minute, r.endMinute)
	}
	var net netip.Prefix // that of no address: all for which there is no room
	if a, err := netip.ParseAddr(addr); err == nil {
		a = a.Unmap().WithZone("")
		net, _ = a.Prefix(min(a.BitLen(), 64)) // in range for both kinds
	}
	if r.of[net] == nil {
		if len(r.of) >= maxAddresses {
			net = netip.Prefix{}
		}
		if r.of[net] == nil {
			r.of[net] = &refused{}
		}
	}
	return r.of[net]
}

// endMinute forgets the minute, and says what was not logged in it.
func (r *refusals) endMinute() {
	r.mu.Lock()
	silent, addresses := r.silent, len(r.of)
	r.of, r.lines, r.silent = nil, 0, 0
	r.mu.Unlock()
	if silent > 0 {
		r.log.Warn("refusals were not logged one by one", "count", silent, "addresses", addresses,
			"unauthorized", r.unauthorized.Load(), "forbidden", r.forbidden.Load(), "tooManyRequests", r.tooMany.Load())
	}
}

// failed notes a wrong or missing key. A wait of more than 0 says that the address has had its share,
// and for how long.
func (r *refusals) failed(addr string) (wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.from(addr)
	if f.failures++; f.failures <= r.most {
		return 0
	}
	return max(time.Until(r.ends), time.Second)
}

// logged reports whether a refusal is worth a line of its own.
func (r *refusals) logged(addr string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.from(addr)
	if f.lines >= addressLines || r.lines >= allLines {
		r.silent++
		return false
	}
	f.lines++
	r.lines++
	return true
}

// count counts an answer.
func (r *refusals) count(k *kind) {
	switch k {
	case errUnauthorized:
		r.unauthorized.Add(1)
	case errForbidden:
		r.forbidden.Add(1)
	case errTooMany:
		r.tooMany.Add(1)
	}
}

// Write takes what net/http says of connections that did not become requests, above all of TLS
// handshakes that strangers did not finish.
func (r *refusals) Write(line []byte) (int, error) {
	if r.logged("") {
		r.log.Warn(strings.TrimSpace(string(line)))
	}
	return len(line), nil
}
