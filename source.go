package main

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
)

// markSource is the header in which a node that forwards a write says what its client's address is.
// It is believed on a connection on which a node has proved to be one.
const markSource = "Confman-Source"

// source is the address of the client, as far as it is proved.
func (c *call) source() string {
	if peer, ok := c.r.Context().Value(betweenNodes{}).(*peerConn); ok {
		if v := c.r.Header[markSource]; len(v) == 1 && net.ParseIP(v[0]) != nil && peer.key != "" {
			return v[0]
		}
		// A node is no proxy: the X-Forwarded-For that it passes on was written by its client.
		host, _, _ := net.SplitHostPort(c.r.RemoteAddr)
		return host
	}
	return c.s.cfg.clientIP(c.r)
}

// clientIP is the address that the connection proves. Where that is a trusted proxy's, it is the
// last one in X-Forwarded-For that is no trusted proxy's: each proxy appends whom it saw, and what
// stands before was written by whoever sent it. What is no address is not believed, nor
// what stands before it.
func (c *config) clientIP(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	if len(c.proxies) == 0 {
		return host
	}
	at, err := netip.ParseAddr(host)
	if err != nil || !c.trusts(at.Unmap()) {
		return host
	}
	at = at.Unmap()
	said := strings.Join(r.Header["X-Forwarded-For"], ",")
	for said != "" && c.trusts(at) {
		i := strings.LastIndexByte(said, ',')
		a, err := netip.ParseAddr(strings.Trim(said[i+1:], " \t"))
		if err != nil || a.Zone() != "" {
			break
		}
		at, said = a.Unmap(), said[:max(i, 0)]
	}
	return at.String()
}

func (c *config) trusts(a netip.Addr) bool {
	for _, p := range c.proxies {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// readProxies reads TrustedProxies.
func (c *config) readProxies() error {
	c.proxies = nil
	for i, s := range c.TrustedProxies {
		p, err := netip.ParsePrefix(s)
		if a, aerr := netip.ParseAddr(s); aerr == nil && a.Zone() == "" {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		switch {
		case err != nil || p.Addr().Is4In6():
			return fmt.Errorf("TrustedProxies[%d]: %q is neither an IP address nor a network such as 10.0.0.0/8", i, s)
		case p.Bits() == 0:
			return fmt.Errorf("TrustedProxies[%d]: %s is everyone; whoever is in it may name any address as his", i, s)
		}
		c.proxies = append(c.proxies, p.Masked())
	}
	return nil
}
