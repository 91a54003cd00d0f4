/* Preloaded into the processes of a Ray node (ray_start.py): a TCP socket that asks to listen on every interface gets the
 * node's own IPv4 address, LBR_NODE_ADDRESS, instead, and who does not find it on loopback then is led there. Ray 2.60 has
 * "0.0.0.0" built into gcs_server, raylet and workers, and 127.0.0.1 into those that send their metrics to the agent. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

typedef int address_function(int, const struct sockaddr *, socklen_t);
typedef union {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
} address_t;

static const unsigned char MAPPED[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

/* The IPv4 address in a name, "::" taken as 0.0.0.0; 0: it has none. */
static int ipv4(const struct sockaddr *name, socklen_t length, struct in_addr *found) {
    if (name && name->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
        *found = ((const struct sockaddr_in *)name)->sin_addr;
        return 1;
    }
    if (!name || name->sa_family != AF_INET6 || length < sizeof(struct sockaddr_in6)) return 0;
    const struct in6_addr *address = &((const struct sockaddr_in6 *)name)->sin6_addr;
    memcpy(found, address->s6_addr + sizeof MAPPED, sizeof *found);
    return !memcmp(address, &in6addr_any, sizeof *address) || !memcmp(address, MAPPED, sizeof MAPPED);
}

/* The same name with the node's address in it; 0: there is none, or the socket is not of TCP. */
static int moved(int socket, const struct sockaddr *name, address_t *made) {
    const char *node = getenv("LBR_NODE_ADDRESS");
    struct in_addr address;
    int kind = 0;
    socklen_t size = sizeof kind;
    if (!node || inet_pton(AF_INET, node, &address) != 1) return 0;
    if (getsockopt(socket, SOL_SOCKET, SO_TYPE, &kind, &size) || kind != SOCK_STREAM) return 0;
    if (name->sa_family == AF_INET) {
        memcpy(&made->v4, name, sizeof made->v4);
        made->v4.sin_addr = address;
        return sizeof made->v4;
    }
    memcpy(&made->v6, name, sizeof made->v6);
    memcpy(made->v6.sin6_addr.s6_addr, MAPPED, sizeof MAPPED);
    memcpy(made->v6.sin6_addr.s6_addr + sizeof MAPPED, &address, sizeof address);
    return sizeof made->v6;
}

int bind(int socket, const struct sockaddr *name, socklen_t length) {
    address_function *next = (address_function *)dlsym(RTLD_NEXT, "bind");
    struct in_addr wanted;
    address_t node;
    int size = 0;
    if (ipv4(name, length, &wanted) && wanted.s_addr == htonl(INADDR_ANY)) size = moved(socket, name, &node);
    return size ? next(socket, &node.any, size) : next(socket, name, length);
}

int connect(int socket, const struct sockaddr *name, socklen_t length) {
    address_function *next = (address_function *)dlsym(RTLD_NEXT, "connect");
    int result = next(socket, name, length);
    struct in_addr wanted;
    address_t node;
    int size, problem = errno;
    socklen_t width = sizeof problem;
    if (!result || !ipv4(name, length, &wanted) || wanted.s_addr != htonl(INADDR_LOOPBACK)) return result;
    if (problem == EINPROGRESS && getsockopt(socket, SOL_SOCKET, SO_ERROR, &problem, &width)) problem = errno;
    if (problem == ECONNREFUSED && (size = moved(socket, name, &node))) {
        result = next(socket, &node.any, size);
        if (!result || errno != ECONNABORTED) return result;
        return next(socket, &node.any, size); /* Linux reports the end of a refused attempt once, if it did not block */
    }
    errno = problem ? problem : EINPROGRESS; /* a refusal on loopback is known at once */
    return -1;
}
