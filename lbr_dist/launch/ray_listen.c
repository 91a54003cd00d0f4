/* Preloaded into the processes of a Ray node (ray_start.py): a TCP socket that asks to listen on every interface gets the
 * node's own IPv4 address, LBR_NODE_ADDRESS, instead. Ray 2.60 has "0.0.0.0" built into gcs_server, raylet and workers. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

typedef int bind_function(int, const struct sockaddr *, socklen_t);

static int wants_every_interface(const struct sockaddr *name, socklen_t length) {
    if (name->sa_family == AF_INET && length >= sizeof(struct sockaddr_in))
        return ((const struct sockaddr_in *)name)->sin_addr.s_addr == htonl(INADDR_ANY);
    if (name->sa_family != AF_INET6 || length < sizeof(struct sockaddr_in6)) return 0;
    const struct in6_addr *address = &((const struct sockaddr_in6 *)name)->sin6_addr;
    static const struct in6_addr mapped = {{{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0}}};
    return !memcmp(address, &in6addr_any, sizeof *address) || !memcmp(address, &mapped, sizeof *address);
}

int bind(int socket, const struct sockaddr *name, socklen_t length) {
    bind_function *next = (bind_function *)dlsym(RTLD_NEXT, "bind");
    const char *node = getenv("LBR_NODE_ADDRESS");
    struct in_addr address;
    int kind = 0;
    socklen_t size = sizeof kind;
    if (!name || !node || inet_pton(AF_INET, node, &address) != 1 || !wants_every_interface(name, length) ||
        getsockopt(socket, SOL_SOCKET, SO_TYPE, &kind, &size) || kind != SOCK_STREAM)
        return next(socket, name, length);
    if (name->sa_family == AF_INET) {
        struct sockaddr_in own;
        memcpy(&own, name, sizeof own);
        own.sin_addr = address;
        return next(socket, (struct sockaddr *)&own, sizeof own);
    }
    struct sockaddr_in6 own;
    memcpy(&own, name, sizeof own);
    memset(&own.sin6_addr, 0, sizeof own.sin6_addr);
    own.sin6_addr.s6_addr[10] = own.sin6_addr.s6_addr[11] = 0xff;
    memcpy(own.sin6_addr.s6_addr + 12, &address, sizeof address);
    return next(socket, (struct sockaddr *)&own, sizeof own);
}
