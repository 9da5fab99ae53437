package backing

import "slices"

// content is what a Fake holds. A page of it exists once something was written
// there: most tests touch little of a disk, and to clear the rest costs more than
// they do.
type content [][]byte

const contentPage = 64 << 10 // bytes

func newContent(size int64) content {
	return make(content, (size+contentPage-1)/contentPage)
}

func (c content) read(p []byte, off int64) {
	for n := 0; len(p) > 0; p, off = p[n:], off+int64(n) {
		page, at := c[off/contentPage], int(off%contentPage)
		if n = min(len(p), contentPage-at); page == nil {
			clear(p[:n])
		} else {
			copy(p[:n], page[at:])
		}
	}
}

func (c content) write(p []byte, off int64) {
	for n := 0; len(p) > 0; p, off = p[n:], off+int64(n) {
		page := &c[off/contentPage]
		if *page == nil {
			*page = make([]byte, contentPage)
		}
		n = copy((*page)[off%contentPage:], p)
	}
}

func (c content) clone() content {
	d := slices.Clone(c)
	for i, page := range d {
		d[i] = slices.Clone(page)
	}
	return d
}
